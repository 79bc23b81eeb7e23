// Dot products of rows in register tiles: what linear and the scores of attention are made of.
//
// The order of every sum is fixed. An element is the sum over blocks of BLOCK columns, block after block; within a
// block each lane of one accumulator takes the columns that load2 gives it, from first to last, and hsum adds the
// lanes. None of this depends on the size of the tile, so an element has the same bits in any of them.
#pragma once

#include "core/tier.h"

namespace llaisys::LLAISYS_TIER {

// Columns of a block: the panels of a tile (4 + 3 rows of f32 with AVX2) then fit the first-level cache, and the
// reduction of the lanes costs a few percent of the products.
constexpr int64_t BLOCK = 1024;
// Columns that a row takes in a panel: two vectors are loaded at a time, the rest is filled with zeros.
static inline int64_t padded(int64_t columns) { return (columns + 2 * Vec::N - 1) / (2 * Vec::N) * (2 * Vec::N); }

// A row of `columns` elements widened to f32, in the order of load2, padded with zeros.
template <class T>
static inline void widen_row(float *panel, const T *row, int64_t columns) {
    int64_t c = 0;
    Vec a, b;
    for (; c + 2 * Vec::N <= columns; c += 2 * Vec::N) {
        load2(row + c, a, b);
        store(panel + c, a);
        store(panel + c + Vec::N, b);
    }
    if (c < columns) {
        load2(row + c, columns - c, a, b);
        store(panel + c, a);
        store(panel + c + Vec::N, b);
    }
}

// out[m, n] (+)= x[m, :] . w[n, :] over one block. x is a panel of f32 rows, already in order and padded to whole
// vectors; w is either such a panel (W = float, padded = true) or rows as they lie in memory, with `columns` elements.
template <int M, int NW, bool padded, class W>
static inline void dot_tile(float *out, int64_t out_row, const float *x, int64_t x_row, const W *const *w,
                            int64_t columns, bool first) {
    Vec sum[M][NW];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NW; ++n) sum[m][n] = zero();
    const auto step = [&](const Vec(&wv)[NW], const float *xp) {
        for (int m = 0; m < M; ++m) {
            const Vec xv = load(xp + m * x_row);
            for (int n = 0; n < NW; ++n) sum[m][n] = fma(xv, wv[n], sum[m][n]);
        }
    };
    Vec a[NW], b[NW];
    int64_t c = 0;
    if constexpr (padded) {
        for (; c < columns; c += Vec::N) {
            for (int n = 0; n < NW; ++n) a[n] = load(w[n] + c);
            step(a, x + c);
        }
    } else {
        for (; c + 2 * Vec::N <= columns; c += 2 * Vec::N) {
            for (int n = 0; n < NW; ++n) load2(w[n] + c, a[n], b[n]);
            step(a, x + c);
            step(b, x + c + Vec::N);
        }
        if (c < columns) {
            for (int n = 0; n < NW; ++n) load2(w[n] + c, columns - c, a[n], b[n]);
            step(a, x + c);
            step(b, x + c + Vec::N);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NW; ++n) {
            const float block = hsum(sum[m][n]);
            out[m * out_row + n] = first ? block : out[m * out_row + n] + block;
        }
}

// dot_tile over `rows` rows of x, up to TILE_M at a time.
constexpr int TILE_M = Vec::N == 16 ? 6 : 4;
template <int NW, bool padded, class W>
static inline void dot_rows(float *out, int64_t out_row, const float *x, int64_t x_row, int64_t rows, const W *const *w,
                            int64_t columns, bool first) {
    int64_t m = 0;
    for (; m + TILE_M <= rows; m += TILE_M)
        dot_tile<TILE_M, NW, padded>(out + m * out_row, out_row, x + m * x_row, x_row, w, columns, first);
    for (; m + 2 <= rows; m += 2)
        dot_tile<2, NW, padded>(out + m * out_row, out_row, x + m * x_row, x_row, w, columns, first);
    if (m < rows) dot_tile<1, NW, padded>(out + m * out_row, out_row, x + m * x_row, x_row, w, columns, first);
}

} // namespace llaisys::LLAISYS_TIER
