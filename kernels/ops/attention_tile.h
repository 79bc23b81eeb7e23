// Products of small matrices in register tiles, and the panels they read: what attention is made of.
//
// An element of a product is one chain of fused additions along the inner axis, from first to last: the lanes of a
// vector are columns, and nothing is added across them. So an element has the same bits in a tile of any size, with any
// number of rows beside it. Keys, which lie in memory with their elements together, are transposed into panels for
// that; it is one pass over the keys for 192 rows of queries, and in decode, where six or seven heads share a key, it
// hides behind the memory that the keys come from. Before, lanes ran along the head and each score ended in a sum
// across them: 512 tokens of 12 heads of 128 took 3.0 ms with two threads of Zen 5 instead of 2.0 (75 % of what its FMA
// units can do), one token over 2048 keys 190 us instead of 55.
#pragma once

#include "core/tier.h"

#include "attention_ahead.h"

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

// panel[d, j] = key[j, d] for `count` <= PANEL keys, and zeros up to whole vectors of keys. Elements are moved in units
// of 32 bits, one of f32 or two of 16 bits; these are then widened to f32 or, if `paired`, left together: [d / 2, j].
// The panel has room for whole vectors of units, and what is behind d is zero.
template <class T, bool paired = false>
static void transpose_keys(float *panel, const char *keys, int64_t key_bytes, int64_t count, int64_t d,
                           Ahead::Share share) {
    constexpr int N = Vec::N, EACH = paired ? 1 : 4 / int(sizeof(T));
    const int64_t bytes = d * int64_t(sizeof(T));
    const int64_t lines = share.each((count + N - 1) / N * ((bytes + 4 * N - 1) / (4 * N)));
    for (int64_t j = 0; j < count; j += N) {
        for (int64_t at = 0; at < bytes; at += 4 * N) {
            share.ahead.ask(lines);
            const char *source = keys + j * key_bytes + at;
            int64_t step = key_bytes;
            // Copied are only keys of which some are missing or of which a part of 16 bytes is.
            const int64_t length = bytes - at < 4 * N ? bytes - at : 4 * N;
            alignas(64) char edge[N][4 * N];
            if (j + N > count || length % 16 != 0) {
                memset(edge, 0, sizeof edge);
                for (int64_t i = 0; i < N && j + i < count; ++i)
                    memcpy(edge[i], source + i * key_bytes, size_t(length));
                source = edge[0];
                step = 4 * N;
            }
            // Blocks of 4 x 4 units are read so that a shuffle of lanes is never needed.
            for (int c = 0; c < N / 4; ++c) {
                float *to = panel + (at / 4 + 4 * c) * EACH * PANEL + j;
                if (16 * c >= length) {
                    for (int i = 0; i < 4 * EACH; ++i) store(to + i * PANEL, zero());
                    continue;
                }
                const char *p = source + 16 * c;
                const Vec r0 = load_quarters(p, 4 * step), r1 = load_quarters(p + step, 4 * step);
                const Vec r2 = load_quarters(p + 2 * step, 4 * step), r3 = load_quarters(p + 3 * step, 4 * step);
                const Vec low01 = interleave_low(r0, r1), high01 = interleave_high(r0, r1);
                const Vec low23 = interleave_low(r2, r3), high23 = interleave_high(r2, r3);
                const Vec column[4] = {pairs_low(low01, low23), pairs_high(low01, low23), pairs_low(high01, high23),
                                       pairs_high(high01, high23)};
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
                         int64_t end, Ahead::Share share) {
    const int64_t lines = share.each(count);
    for (int64_t j = 0; j < count; ++j) {
        share.ahead.ask(lines);
        const auto *value = (const T *)(values + j * value_bytes);
        float *to = panel + j * PANEL;
        int64_t c = begin;
        for (; c + Vec::N <= end; c += Vec::N) store(to + c - begin, load(value + c));
        if (c < end) store(to + c - begin, load(value + c, end - c));
    }
}

// How products in vector registers begin and end, and the rows that the next tile takes.
struct VectorMath {
    static void begin() {}
    static void end() {}
    static int64_t rows(int64_t left) { return tile_rows(left); }
};

// How elements of T are multiplied: widened to f32. What self_attention.cpp asks of the arithmetic of a dtype.
template <class T>
struct AttentionMath : VectorMath {
    using Factor = float;                         // element of a row of queries or weights
    static constexpr int64_t PARTS = 1;           // elements that hold a weight
    static int64_t depth(int64_t d) { return d; } // elements of a row of queries

    static void query(float *to, const T *q, int64_t d) {
        int64_t c = 0;
        for (; c + Vec::N <= d; c += Vec::N) store(to + c, load(q + c));
        if (c < d) store(to + c, load(q + c, d - c), d - c);
    }
    static void weight(float *row, int64_t at, Vec e) { store(row + at, e); }

    static void keys(float *panel, const char *k, int64_t k_bytes, int64_t count, int64_t d, Ahead::Share share) {
        transpose_keys<T>(panel, k, k_bytes, count, d, share);
    }
    // scores[i, :] of n rows of queries.
    static void score(float *scores, int64_t scores_row, const float *queries, int64_t n, const float *panel,
                      int64_t vectors, int64_t d) {
        product<float>(scores, scores_row, queries, d, n, (const char *)panel, PANEL * 4, vectors, 0, d);
    }

    // Few rows read the values where they lie; many would wait for the conversion each time.
    static bool direct(int64_t rows, int64_t d) { return rows <= 2 * TILE_ROWS && d % Vec::N == 0; }
    static void values(float *panel, const char *v, int64_t v_bytes, int64_t count, int64_t begin, int64_t end,
                       Ahead::Share share) {
        widen_values<T>(panel, v, v_bytes, count, begin, end, share);
    }
    // out[i, :] = sum of the first limit(i) values, weighted, for n rows, of which no one sees fewer keys than the one
    // before: the values seen by all of them together, then those that only some of them see. Each row stops at its own
    // last key, also where it shares a tile: a weight of 0 would not keep a NaN or an infinity of a key that lies in
    // its future out.
    template <class V, class Limit>
    static void weigh_as(float *out, int64_t out_row, const float *weights, int64_t weights_row, int64_t n,
                         const char *v, int64_t v_bytes, int64_t vectors, Limit limit) {
        const int64_t common = limit(0);
        product<V>(out, out_row, weights, weights_row, n, v, v_bytes, vectors, 0, common);
        for (int64_t i = 1; i < n; ++i)
            if (const int64_t own = limit(i); own > common)
                product<V>(out + i * out_row, out_row, weights + i * weights_row, weights_row, 1, v, v_bytes, vectors,
                           common, own);
    }
    template <class Limit>
    static void weigh(float *out, int64_t out_row, const float *weights, int64_t weights_row, int64_t n,
                      const float *panel, int64_t vectors, Limit limit) {
        weigh_as<float>(out, out_row, weights, weights_row, n, (const char *)panel, PANEL * 4, vectors, limit);
    }
    template <class Limit>
    static void weigh_direct(float *out, int64_t out_row, const float *weights, int64_t weights_row, int64_t n,
                             const char *v, int64_t v_bytes, int64_t vectors, Limit limit) {
        weigh_as<T>(out, out_row, weights, weights_row, n, v, v_bytes, vectors, limit);
    }
};

} // namespace llaisys::LLAISYS_TIER
