// Dot products in register tiles: how linear multiplies in vector registers.
//
// The lanes run along the columns. A step multiplies one register of a row of x by one of a row of the weights and adds
// the products to one register of sums; after a block of BLOCK_BYTES of a row (in the form in which it is multiplied)
// hsums adds the lanes, and the sums of the blocks are added one after the other. That is the order of every element,
// in any tile: none of the sizes below is part of it but the block's.
//
// In a panel the rows of a tile lie register beside register, so that a tile reads one stream from each operand,
// whatever the lengths of the rows are: a power of two between rows would put them all into one set of the first-level
// cache.
#pragma once

#include "core/tier.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace llaisys::LLAISYS_TIER {

// How elements of T are multiplied: widened to f32. A unit of COLUMNS columns becomes REGS registers, in load2's order.
template <class T>
struct Product {
    using Reg = Vec;
    static constexpr int REGS = 2;
    static constexpr int64_t COLUMNS = 2 * Vec::N;
    static inline void unit(Reg (&r)[REGS], const T *p) { load2(p, r[0], r[1]); }
    static inline void unit(Reg (&r)[REGS], const T *p, int64_t n) { load2(p, n, r[0], r[1]); }
    static inline Reg get(const char *panel) { return load((const float *)panel); }
    static inline void put(char *panel, Reg r) { store((float *)panel, r); }
    static inline Vec add(Reg x, Reg w, Vec sum) { return fma(x, w, sum); }
};

#if defined(__AVX512BF16__)
// bf16 as it is: each lane adds the products of a pair of columns. The processor takes subnormal numbers for zero and
// flushes subnormal sums, as the bound of the SPEC says.
template <>
struct Product<bf16> {
    using Reg = __m512i;
    static constexpr int REGS = 1;
    static constexpr int64_t COLUMNS = 32;
    static inline void unit(Reg (&r)[REGS], const bf16 *p) { r[0] = _mm512_loadu_si512(p); }
    static inline void unit(Reg (&r)[REGS], const bf16 *p, int64_t n) {
        r[0] = _mm512_maskz_loadu_epi16(__mmask32((1u << n) - 1), p);
    }
    static inline Reg get(const char *panel) { return _mm512_load_si512(panel); }
    static inline void put(char *panel, Reg r) { _mm512_store_si512(panel, r); }
    static inline Vec add(Reg x, Reg w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, __m512bh(x), __m512bh(w))}; }
};
#endif

constexpr int64_t REG = sizeof(Vec);
// Of a row of a panel, at most this much is summed before the lanes are added. The panels of a tile then fit the
// first-level cache, and adding the lanes costs a few percent of the products.
constexpr int64_t BLOCK_BYTES = 4096;

// Rows of x and of the weights in a tile: their sums, a register for each of the weights and one for x fill the
// registers.
constexpr int64_t TILE_ROWS = Vec::N == 16 ? 6 : 4;
constexpr int64_t TILE_FEATURES = Vec::N == 16 ? 4 : Vec::N == 8 ? 3 : 2;

template <class T>
static inline int64_t units_of(int64_t columns) {
    return (columns + Product<T>::COLUMNS - 1) / Product<T>::COLUMNS;
}
// Bytes that a row of `columns` columns takes in a panel.
template <class T>
static inline int64_t panel_bytes(int64_t columns) {
    return units_of<T>(columns) * Product<T>::REGS * REG;
}
// Columns of the blocks of a row, but for the last one: the blocks are as even as can be.
template <class T>
static inline int64_t block_columns(int64_t columns) {
    constexpr int64_t MOST = BLOCK_BYTES / (Product<T>::REGS * REG);
    const int64_t units = units_of<T>(columns), blocks = (units + MOST - 1) / MOST;
    return blocks < 2 ? units * Product<T>::COLUMNS : (units + blocks - 1) / blocks * Product<T>::COLUMNS;
}

// One row into a panel of `rows` rows.
template <class T>
static inline void pack_row(char *panel, int64_t rows, const T *row, int64_t columns) {
    using P = Product<T>;
    typename P::Reg r[P::REGS];
    const auto put = [&] {
        for (int i = 0; i < P::REGS; ++i) P::put(panel + i * rows * REG, r[i]);
        panel += P::REGS * rows * REG;
    };
    int64_t c = 0;
    for (; c + P::COLUMNS <= columns; c += P::COLUMNS) {
        P::unit(r, row + c);
        put();
    }
    if (c < columns) {
        P::unit(r, row + c, columns - c);
        put();
    }
}

template <class T, int M, int N>
static inline void multiply(Vec (&sum)[M * N], const char *x, const typename Product<T>::Reg (&w)[N]) {
    for (int m = 0; m < M; ++m) {
        const typename Product<T>::Reg xv = Product<T>::get(x + m * REG);
        for (int n = 0; n < N; ++n) sum[m * N + n] = Product<T>::add(xv, w[n], sum[m * N + n]);
    }
}

// In two loops, which become single registers: as one of 24 turns it became a memset.
template <int M, int N>
LLAISYS_INLINE static inline void clear(Vec (&sum)[M * N]) {
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m * N + n] = zero();
}

// out[m, n] (+)= sums[m, n]
template <int M, int N>
LLAISYS_INLINE static inline void put_sums(float *out, int64_t out_row, const float *sums, bool first) {
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float &to = out[m * out_row + n];
            to = first ? sums[m * N + n] : to + sums[m * N + n];
        }
}
template <int M, int N>
LLAISYS_INLINE static inline void add_sums(float *out, int64_t out_row, const Vec (&sum)[M * N], bool first) {
    alignas(64) float sums[(M * N + Vec::N - 1) / Vec::N * Vec::N];
    hsums<M * N>(sums, sum);
    put_sums<M, N>(out, out_row, sums, first);
}

// The steps of a tile from x up to `end`, and of w beside it. As much from `ahead` on is asked for on the way.
template <class T, int M>
LLAISYS_INLINE static inline void panel_steps(Vec (&sum)[M * TILE_FEATURES], const char *x, const char *end,
                                              const char *w, const char *ahead) {
    constexpr int N = TILE_FEATURES;
    for (; x != end; x += M * REG, w += N * REG, ahead += REG) {
        typename Product<T>::Reg wv[N];
        __builtin_prefetch(ahead);
        for (int n = 0; n < N; ++n) wv[n] = Product<T>::get(w + n * REG);
        multiply<T, M, N>(sum, x, wv);
    }
}

// out[m, n] (+)= x[m, :] . w[n, :] over one block of `bytes` of each row, from a panel of M rows and one of
// TILE_FEATURES. As much from `ahead` on, which is packed next, is asked for on the way.
template <class T, int M>
static inline void panel_tile(float *out, int64_t out_row, const char *x, const char *w, int64_t bytes, bool first,
                              const char *ahead) {
    constexpr int N = TILE_FEATURES;
    Vec sum[M * N];
    clear<M, N>(sum);
    panel_steps<T, M>(sum, x, x + M * bytes, w, ahead);
    add_sums<M, N>(out, out_row, sum, first);
}

#if defined(__AVX512F__)
// For panel_tiles: so many steps of a tile come between the sums of the one before.
constexpr int STEPS_AHEAD = 2;

// The first steps of row m of a tile.
template <class T, int M, int m>
LLAISYS_INLINE static inline void begin_row(Vec (&sum)[M * TILE_FEATURES], const char *x, const char *w) {
    for (int step = 0; step < STEPS_AHEAD; ++step)
        for (int n = 0; n < TILE_FEATURES; ++n) {
            Vec &to = sum[m * TILE_FEATURES + n];
            to = Product<T>::add(Product<T>::get(x + (step * M + m) * REG),
                                 Product<T>::get(w + (step * TILE_FEATURES + n) * REG), step == 0 ? zero() : to);
        }
}
template <class T, int M, int m = 0>
LLAISYS_INLINE static inline void begin_tile(Vec (&sum)[M * TILE_FEATURES], const char *x, const char *w) {
    begin_row<T, M, m>(sum, x, w);
    if constexpr (m + 1 < M) begin_tile<T, M, m + 1>(sum, x, w);
}

// What row m of a tile has become, its lanes added within 128 bits. If there is `MORE`, the row begins with the next
// tile, whose panels are x and w.
template <class T, int M, int m, bool MORE>
LLAISYS_INLINE static inline Vec end_row(Vec (&sum)[M * TILE_FEATURES], const char *x, const char *w) {
    if constexpr (m < M) {
        constexpr int at = m * TILE_FEATURES;
        const Vec parts = hsum_parts(sum[at], sum[at + 1], sum[at + 2], sum[at + 3]);
        if constexpr (MORE) begin_row<T, M, m>(sum, x, w);
        return parts;
    }
    return zero();
}
template <class T, int M, bool MORE>
LLAISYS_INLINE static inline void end_tile(float *out, int64_t out_row, Vec (&sum)[M * TILE_FEATURES], const char *x,
                                           const char *w, bool first) {
    alignas(64) float sums[2 * Vec::N];
    const Vec a = end_row<T, M, 0, MORE>(sum, x, w), b = end_row<T, M, 1, MORE>(sum, x, w);
    const Vec c = end_row<T, M, 2, MORE>(sum, x, w), d = end_row<T, M, 3, MORE>(sum, x, w);
    store(sums, hsum_whole(a, b, c, d));
    if constexpr (M > 4) {
        const Vec e = end_row<T, M, 4, MORE>(sum, x, w), f = end_row<T, M, 5, MORE>(sum, x, w);
        store(sums + Vec::N, hsum_whole(e, f, e, f));
    }
    put_sums<M, TILE_FEATURES>(out, out_row, sums, first);
}

// Tiles of which each begins within the end of the one before.
template <class T, int M, class Ahead>
static inline void joined_tiles(float *out, int64_t out_row, const char *x, const char *w, int64_t bytes, int64_t count,
                                bool first, Ahead ahead) {
    constexpr int N = TILE_FEATURES;
    Vec sum[M * N];
    begin_tile<T, M>(sum, x, w);
    for (int64_t i = 0;; out += N) {
        const char *coming = ahead(i);
        for (int step = 0; step < STEPS_AHEAD; ++step, coming += REG) __builtin_prefetch(coming);
        panel_steps<T, M>(sum, x + STEPS_AHEAD * M * REG, x + M * bytes, w + STEPS_AHEAD * N * REG, coming);
        if (++i == count) return end_tile<T, M, false>(out, out_row, sum, x, w, first);
        w += N * bytes;
        end_tile<T, M, true>(out, out_row, sum, x, w, first);
    }
}
#endif

// `count` tiles beside each other, their panels of weights one behind the other; tile i asks for what is at `ahead(i)`.
//
// Adding up the lanes is a chain of some 20 cycles, which fills the processor's queues so that the next tile waits for
// it; so the first products of that one are put between. The sums of each element stay the same. On Zen 5 a tile of 6
// rows takes 13 % less with 224 columns of bf16, 4 % with 896 and 2.5 % with 1536. What else was tried there: a tree
// with half as many shuffles, blends in their place (no less, as it is the chain that is waited for); halves of two
// rows in one register, whose first sums need no shuffle (3 cycles less, lost to loads that fill both halves); 1 and 3
// steps (within 1 %).
template <class T, int M, class Ahead>
static inline void panel_tiles(float *out, int64_t out_row, const char *x, const char *w, int64_t bytes, int64_t count,
                               bool first, Ahead ahead) {
#if defined(__AVX512F__)
    if (bytes >= STEPS_AHEAD * REG) return joined_tiles<T, M>(out, out_row, x, w, bytes, count, first, ahead);
#endif
    for (int64_t i = 0; i < count; ++i)
        panel_tile<T, M>(out + i * TILE_FEATURES, out_row, x, w + i * TILE_FEATURES * bytes, bytes, first, ahead(i));
}

// out[m, n] = x[m, :] * w[n, :], lane by lane, from a panel of M rows and N rows of the weights as they lie in memory,
// of which `columns` are multiplied. While they are read, what lies `far` columns further in each row is asked for, up
// to column `turn`, and from there on what is needed after it, at `next`.
template <class T, int M, int N>
LLAISYS_INLINE static inline void memory_sums(Vec (&sum)[M * N], const char *x, const T *const (&w)[N], int64_t columns,
                                              const T *const (&next)[N], int64_t far, int64_t turn) {
    using P = Product<T>;
    clear<M, N>(sum);
    typename P::Reg wv[P::REGS][N];
    const auto step = [&] {
        for (int i = 0; i < P::REGS; ++i, x += M * REG) multiply<T, M, N>(sum, x, wv[i]);
    };
    const auto keep = [&](int n, const typename P::Reg(&r)[P::REGS]) {
        for (int i = 0; i < P::REGS; ++i) wv[i][n] = r[i];
    };
    typename P::Reg r[P::REGS];
    int64_t c = 0;
    const auto run = [&](int64_t until, const T *const(&ahead)[N], int64_t shift) {
        for (; c + P::COLUMNS <= until; c += P::COLUMNS) {
            for (int n = 0; n < N; ++n) {
                P::unit(r, w[n] + c);
                keep(n, r);
                for (int64_t line = 0; line < P::COLUMNS; line += 64 / int64_t(sizeof(T)))
                    __builtin_prefetch(ahead[n] + c + shift + line);
            }
            step();
        }
    };
    run(columns < turn ? columns : turn, w, far);
    run(columns, next, -turn);
    if (c < columns) {
        for (int n = 0; n < N; ++n) {
            P::unit(r, w[n] + c, columns - c);
            keep(n, r);
        }
        step();
    }
}
template <class T, int M, int N>
static inline void memory_tile(float *out, int64_t out_row, const char *x, const T *const (&w)[N], int64_t columns,
                               bool first, const T *const (&next)[N], int64_t far, int64_t turn) {
    Vec sum[M * N];
    memory_sums<T, M, N>(sum, x, w, columns, next, far, turn);
    add_sums<M, N>(out, out_row, sum, first);
}

// Rows of `bytes` bytes, `step` apart, which are asked for unit by unit in the order in which they lie in memory. (The
// Ahead of attention does more for a line: of 28 us that 16 rows of bf16 times 384 features of 1536 columns take in the
// caches, it made 32.)
template <class T>
struct Stream {
    const char *at, *end;
    int64_t bytes, step;
    void ask() {
        constexpr int64_t UNIT = Product<T>::COLUMNS * int64_t(sizeof(T));
        for (int64_t line = 0; line < UNIT; line += 64) __builtin_prefetch(at + line);
        if ((at += UNIT) < end) return;
        at = end - bytes + step;
        end += step;
    }
};

// A part of a block, lane by lane: sums[m, n] (+)= x[m, :] * w[n, :] over `columns` of N rows of the weights as they
// lie in memory. On the way as much is asked for from each of the two `next`, if they are given, and beside each unit
// one of what comes `later`, or two if `twice`. The loop is that of memory_sums once more: in a function that both
// call, gcc 12 leaves the sums in memory, and 16 rows of bf16 times 8960 features of 1536 columns took 1.25 ms instead
// of 0.67, 4 rows 0.50 instead of 0.39.
template <class T, int M, int N>
static inline void part_tile(float *sums, const char *x, const T *const (&w)[N], int64_t columns, bool first,
                             const T *const *next, Stream<T> &later, bool twice) {
    using P = Product<T>;
    Vec sum[M * N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sum[m * N + n] = first ? zero() : load(sums + (m * N + n) * Vec::N);
    typename P::Reg wv[P::REGS][N], r[P::REGS];
    const auto step = [&] {
        for (int i = 0; i < P::REGS; ++i, x += M * REG) multiply<T, M, N>(sum, x, wv[i]);
    };
    const auto keep = [&](int n) {
        for (int i = 0; i < P::REGS; ++i) wv[i][n] = r[i];
    };
    int64_t c = 0;
    for (; c + P::COLUMNS <= columns; c += P::COLUMNS) {
        for (int n = 0; n < N; ++n) {
            P::unit(r, w[n] + c);
            keep(n);
        }
        for (int64_t line = c; next && line < c + P::COLUMNS; line += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(next[0] + line);
            __builtin_prefetch(next[1] + line);
        }
        later.ask();
        if (twice) later.ask();
        step();
    }
    if (c < columns) {
        for (int n = 0; n < N; ++n) {
            P::unit(r, w[n] + c, columns - c);
            keep(n);
        }
        step();
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(sums + (m * N + n) * Vec::N, sum[m * N + n]);
}

} // namespace llaisys::LLAISYS_TIER
