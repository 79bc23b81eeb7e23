// Products of small matrices in register tiles, and the panels they read: what attention is made of.
//
// An element of a product is one chain of fused additions along the inner axis, from first to last: the lanes of a
// vector are columns, and nothing is added across them. So an element has the same bits in a tile of any size, with any
// number of rows beside it. Keys, which lie in memory with their elements together, are transposed into panels for
// that; it costs 5 % of the products of a prompt, and in decode, where six or seven heads share a key, it hides behind
// the memory that the keys come from. Dot products with lanes along the head, each with a sum across the lanes at its
// end, took 1.5 times as long on a prompt.
#pragma once

#include "core/tier.h"

namespace llaisys::LLAISYS_TIER {

// Rows and vectors of a register tile: 24 sums of 32 registers with AVX-512, 12 of 16 else.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = Vec::N == 16 ? 4 : 2;
constexpr int64_t PANEL = TILE_VECTORS * Vec::N; // columns of a panel

static inline int64_t whole_vectors(int64_t n) { return (n + Vec::N - 1) / Vec::N * Vec::N; }

// out[m, :] (+)= sum over k in [begin, end) of a[m, k] b[k, :], for M rows and NV vectors; b_row is in bytes.
template <int M, int NV, class T>
static inline void product_tile(float *out, int64_t out_row, const float *a, int64_t a_row, const char *b,
                                int64_t b_row, int64_t begin, int64_t end) {
    Vec sum[M][NV];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) sum[m][n] = begin == 0 ? zero() : load(out + m * out_row + n * Vec::N);
    for (int64_t k = begin; k < end; ++k) {
        Vec column[NV];
        for (int n = 0; n < NV; ++n) column[n] = load((const T *)(b + k * b_row) + n * Vec::N);
        for (int m = 0; m < M; ++m) {
            const Vec factor = set1(a[m * a_row + k]);
            for (int n = 0; n < NV; ++n) sum[m][n] = fma(factor, column[n], sum[m][n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) store(out + m * out_row + n * Vec::N, sum[m][n]);
}

// product_tile of up to TILE_ROWS rows and TILE_VECTORS vectors.
template <class T, int M = TILE_ROWS, int NV = TILE_VECTORS>
static inline void product(float *out, int64_t out_row, const float *a, int64_t a_row, int64_t rows, const char *b,
                           int64_t b_row, int64_t vectors, int64_t begin, int64_t end) {
    if constexpr (M > 1) {
        if (rows < M) return product<T, M - 1, NV>(out, out_row, a, a_row, rows, b, b_row, vectors, begin, end);
    }
    if constexpr (NV > 1) {
        if (vectors < NV) return product<T, M, NV - 1>(out, out_row, a, a_row, rows, b, b_row, vectors, begin, end);
    }
    product_tile<M, NV, T>(out, out_row, a, a_row, b, b_row, begin, end);
}

// Rows of the next tile of `rows` that are left: as many as fit, but 4 and 3 rather than 6 and 1.
static inline int64_t tile_rows(int64_t rows) {
    return rows <= TILE_ROWS ? rows : rows < 2 * TILE_ROWS ? (rows + 1) / 2 : TILE_ROWS;
}

// panel[d, j] = key[j, d] in f32 for `count` <= PANEL keys, and zeros up to whole vectors of keys. Elements are moved
// in units of 32 bits, one of f32 or two of 16 bits; the panel has room for whole vectors of units.
template <class T>
static void transpose_keys(float *panel, const char *keys, int64_t key_bytes, int64_t count, int64_t d) {
    constexpr int N = Vec::N, EACH = 4 / int(sizeof(T));
    const int64_t bytes = d * int64_t(sizeof(T));
    for (int64_t j = 0; j < count; j += N) {
        for (int64_t at = 0; at < bytes; at += 4 * N) {
            const char *source = keys + j * key_bytes + at;
            int64_t step = key_bytes;
            alignas(64) char edge[N][4 * N];
            if (j + N > count || at + 4 * N > bytes) {
                memset(edge, 0, sizeof edge);
                const int64_t length = bytes - at < 4 * N ? bytes - at : 4 * N;
                for (int64_t i = 0; i < N && j + i < count; ++i)
                    memcpy(edge[i], source + i * key_bytes, size_t(length));
                source = edge[0];
                step = 4 * N;
            }
            // Blocks of 4 x 4 units are read so that a shuffle of lanes is never needed.
            for (int c = 0; c < N / 4; ++c) {
                const char *p = source + 16 * c;
                const Vec r0 = load_quarters(p, 4 * step), r1 = load_quarters(p + step, 4 * step);
                const Vec r2 = load_quarters(p + 2 * step, 4 * step), r3 = load_quarters(p + 3 * step, 4 * step);
                const Vec low01 = interleave_low(r0, r1), high01 = interleave_high(r0, r1);
                const Vec low23 = interleave_low(r2, r3), high23 = interleave_high(r2, r3);
                const Vec column[4] = {pairs_low(low01, low23), pairs_high(low01, low23), pairs_low(high01, high23),
                                       pairs_high(high01, high23)};
                float *to = panel + (at / 4 + 4 * c) * EACH * PANEL + j;
                for (int i = 0; i < 4; ++i) {
                    if constexpr (EACH == 1) {
                        store(to + i * PANEL, column[i]);
                    } else {
                        Vec lower, upper;
                        split_lanes(column[i], (const T *)nullptr, lower, upper);
                        store(to + 2 * i * PANEL, lower);
                        store(to + (2 * i + 1) * PANEL, upper);
                    }
                }
            }
        }
    }
}

// panel[j, :] = value[j, :] in f32, for columns [begin, end) of the head; the last vector is filled up with zeros.
template <class T>
static void widen_values(float *panel, const char *values, int64_t value_bytes, int64_t count, int64_t begin,
                         int64_t end) {
    for (int64_t j = 0; j < count; ++j) {
        const auto *value = (const T *)(values + j * value_bytes);
        float *to = panel + j * PANEL;
        int64_t c = begin;
        for (; c + Vec::N <= end; c += Vec::N) store(to + c - begin, load(value + c));
        if (c < end) store(to + c - begin, load(value + c, end - c));
    }
}

} // namespace llaisys::LLAISYS_TIER
