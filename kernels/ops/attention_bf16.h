// Attention in bf16 with products of pairs: the dot product of AVX-512 and, where there are tiles, AMX.
//
// Queries and weights are rows of bf16, the weights rounded as the contract allows; a lane of a panel holds a pair, two
// elements of a key or one of two keys that follow each other. An element of a product is one chain of such pairs from
// first to last. The processor takes subnormal numbers for zero and flushes subnormal sums; the bound of the SPEC says
// so.
//
// On Zen 5, 512 tokens of 12 heads of 128 take 1.2 ms with two threads, and 2.0 widened to f32. On Intel's cores the
// dot product is no faster than FMA in f32, but these have tiles.
//
// Tiles multiply 16 rows by 32 elements at once. Of the weights a row takes whole chunks of 32 keys that it sees all of
// by tiles, and the keys behind by pairs of AVX-512: which does what depends on the position of the row alone.
#pragma once

#include "attention_tile.h"

#if defined(__AMX_BF16__)
#include "core/amx.h"
#endif
#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

constexpr int64_t CHUNK = 32; // bf16 elements of a row of a tile

static inline int32_t pair_at(const bf16 *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return pair;
}
// The pair in all lanes. clang 16 crashes where it may fold the broadcast into the dot product, so it is not shown one.
static inline __m512i splat(int32_t pair) {
    __m512i x = _mm512_set1_epi32(pair);
#if defined(__clang__)
    __asm__("" : "+v"(x));
#endif
    return x;
}
// Which elements of two vectors of 32, the second's from 32 on, become pairs: the first 16 and the last 16.
static inline void interleaved(__m512i &low, __m512i &high) {
    const __m512i pair = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    low = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_add_epi32(pair, _mm512_set1_epi32(32)), 16));
    high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
}
static inline Vec dot(Vec sum, __m512i a, __m512i b) { return {_mm512_dpbf16_ps(sum.v, __m512bh(a), __m512bh(b))}; }

// out[m, :] (+)= sum over pairs in [begin, end) of a[m, pair] panel[pair, :], and, if `half`, the lower elements of the
// pair behind.
template <int M, int NV>
static inline void pair_tile(float *out, int64_t out_row, const bf16 *a, int64_t a_row, const float *panel,
                             int64_t begin, int64_t end, bool half) {
    Vec sum[M][NV];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) sum[m][n] = begin == 0 ? zero() : load(out + m * out_row + n * Vec::N);
    for (int64_t k = begin; k < end; ++k) {
        __m512i column[NV];
        for (int n = 0; n < NV; ++n) column[n] = _mm512_loadu_si512(panel + k * PANEL + n * Vec::N);
        for (int m = 0; m < M; ++m) {
            const __m512i factor = splat(pair_at(a + m * a_row + 2 * k));
            for (int n = 0; n < NV; ++n) sum[m][n] = dot(sum[m][n], factor, column[n]);
        }
    }
    if (half) {
        const __m512i lower = _mm512_set1_epi32(0xffff);
        for (int n = 0; n < NV; ++n) {
            const __m512i column = _mm512_and_si512(_mm512_loadu_si512(panel + end * PANEL + n * Vec::N), lower);
            for (int m = 0; m < M; ++m) sum[m][n] = dot(sum[m][n], splat(a[m * a_row + 2 * end].bits), column);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) store(out + m * out_row + n * Vec::N, sum[m][n]);
}
template <int M = TILE_ROWS, int NV = TILE_VECTORS>
static inline void pair_product(float *out, int64_t out_row, const bf16 *a, int64_t a_row, int64_t rows,
                                const float *panel, int64_t vectors, int64_t begin, int64_t end, bool half) {
    if constexpr (M > 1) {
        if (rows < M) return pair_product<M - 1, NV>(out, out_row, a, a_row, rows, panel, vectors, begin, end, half);
    }
    if constexpr (NV > 1) {
        if (vectors < NV)
            return pair_product<M, NV - 1>(out, out_row, a, a_row, rows, panel, vectors, begin, end, half);
    }
    pair_tile<M, NV>(out, out_row, a, a_row, panel, begin, end, half);
}

#if defined(__AMX_BF16__)
// Calls `call` with 0 to NV - 1 as a constant.
template <int NV, class Call>
static inline void each_vector(Call call) {
    call.template operator()<0>();
    if constexpr (NV > 1) call.template operator()<1>();
    if constexpr (NV > 2) call.template operator()<2>();
    if constexpr (NV > 3) call.template operator()<3>();
}

// out[m, :] (+)= sum over chunks in [begin, end) of products of 16 rows and a panel of `vectors` vectors. Tiles 0 to 3
// hold the sums. `rows(c)` loads what lies in chunk c of the rows, `add<N>(c)` adds the products with vector N.
template <int NV = TILE_VECTORS, class Load, class Add>
static inline void chunk_sums(float *out, int64_t out_row, int64_t vectors, int64_t begin, int64_t end, Load rows,
                              Add add) {
    if constexpr (NV > 1) {
        if (vectors < NV) return chunk_sums<NV - 1>(out, out_row, vectors, begin, end, rows, add);
    }
    const int64_t out_bytes = out_row * 4;
    each_vector<NV>([&]<int N>() { begin == 0 ? tile_zero<N>() : tile_load<N>(out + 16 * N, out_bytes); });
    for (int64_t c = begin; c < end; ++c) {
        rows(c);
        each_vector<NV>([&]<int N>() { add.template operator()<N>(c); });
    }
    each_vector<NV>([&]<int N>() { tile_store<N>(out + 16 * N, out_bytes); });
}
// With a[m, chunk] and panel[chunk, :]: tile 4 holds the rows, 5 and 6 the panel in turns.
static inline void chunk_product(float *out, int64_t out_row, const bf16 *a, int64_t a_row, const float *panel,
                                 int64_t vectors, int64_t begin, int64_t end) {
    chunk_sums(
        out, out_row, vectors, begin, end, [&](int64_t c) { tile_load<4>(a + c * CHUNK, a_row * 2); },
        [&]<int N>(int64_t c) {
            constexpr int B = 5 + N % 2;
            tile_load<B>(panel + c * (CHUNK / 2) * PANEL + 16 * N, PANEL * 4);
            tile_dot<N, 4, B>();
        });
}

// The chunks that each row sees all of: `product` adds those in [begin, end) to the sums of all rows.
template <class Limit, class Product>
static inline void weigh_chunks(float *out, int64_t out_row, int64_t n, int64_t vectors, Limit limit, Product product) {
    alignas(64) float sums[16 * PANEL];
    int64_t done = 0;
    while (done < n) {
        // Chunks that the next row sees all of, and with it those behind; who is done keeps what it has.
        const int64_t before = done == 0 ? 0 : limit(done - 1) / CHUNK, chunks = limit(done) / CHUNK;
        if (chunks > before) product(sums, before, chunks);
        const int64_t from = done;
        while (done < n && limit(done) / CHUNK == chunks) ++done;
        if (chunks > 0)
            for (int64_t i = from; i < done; ++i)
                for (int64_t c = 0; c < vectors * Vec::N; c += Vec::N)
                    store(out + i * out_row + c, load(sums + i * PANEL + c));
    }
}
#endif

// Calls `call` with the first row, their number and their keys for rows that see the same keys together.
template <class Limit, class Call>
static inline void same_keys(int64_t n, Limit limit, Call call) {
    for (int64_t i = 0, same; i < n; i += same) {
        const int64_t own = limit(i);
        for (same = 1; i + same < n && same < TILE_ROWS && limit(i + same) == own;) ++same;
        call(i, same, own);
    }
}

#if defined(__AMX_BF16__)
struct TileMath {
    static void begin() { tile_configure(whole_tiles()); }
    static void end() { tile_release(); }
    static int64_t rows(int64_t left) { return left < 16 ? left : 16; }
};
#else
using TileMath = VectorMath;
#endif
// What the kernels have in common that read the values from panels only.
struct PanelMath : TileMath {
    static bool direct(int64_t, int64_t) { return false; }
    template <class Limit>
    static void weigh_direct(float *, int64_t, const bf16 *, int64_t, int64_t, const char *, int64_t, int64_t, Limit) {}
};

template <>
struct AttentionMath<bf16> : PanelMath {
    using Factor = bf16;
    static constexpr int64_t PARTS = 1;
    static int64_t depth(int64_t d) { return (d + CHUNK - 1) / CHUNK * CHUNK; }

    static void query(bf16 *to, const bf16 *q, int64_t d) {
        memcpy(to, q, size_t(d) * sizeof(bf16));
        memset(to + d, 0, size_t(depth(d) - d) * sizeof(bf16));
    }
    static void weight(bf16 *row, int64_t at, Vec e) {
        _mm256_storeu_si256((__m256i *)(row + at), __m256i(_mm512_cvtneps_pbh(e.v)));
    }

    static void keys(float *panel, const char *k, int64_t k_bytes, int64_t count, int64_t d, Ahead::Share share) {
        transpose_keys<bf16, true>(panel, k, k_bytes, count, d, share);
    }
    // panel[j / 2, c] = value[j, c] and value[j + 1, c], for columns [begin, end) of the head; zeros where there are
    // none.
    static void values(float *panel, const char *v, int64_t v_bytes, int64_t count, int64_t begin, int64_t end,
                       Ahead::Share share) {
        const int64_t lines = share.each((end - begin + CHUNK - 1) / CHUNK * ((count + 1) / 2));
        __m512i lower_half, upper_half; // of 32 pairs: elements of a, and from 32 on of b
        interleaved(lower_half, upper_half);
        for (int64_t c = begin; c < end; c += CHUNK) {
            const __mmask32 mask = end - c < CHUNK ? (1u << (end - c)) - 1 : ~0u;
            for (int64_t j = 0; j < count; j += 2) {
                share.ahead.ask(lines);
                const auto *at = (const bf16 *)(v + j * v_bytes) + c;
                const __m512i a = _mm512_maskz_loadu_epi16(mask, at);
                const __m512i b =
                    _mm512_maskz_loadu_epi16(j + 1 < count ? mask : 0, (const bf16 *)((const char *)at + v_bytes));
                float *to = panel + j / 2 * PANEL + c - begin;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, lower_half, b));
                _mm512_storeu_si512(to + Vec::N, _mm512_permutex2var_epi16(a, upper_half, b));
            }
        }
    }
    // Keys [from, limit(i)) of each row, rows that see the same keys together.
    template <class Limit, class From>
    static void weigh_pairs(float *out, int64_t out_row, const bf16 *weights, int64_t weights_row, int64_t n,
                            const float *panel, int64_t vectors, Limit limit, From from) {
        same_keys(n, limit, [&](int64_t i, int64_t rows, int64_t own) {
            if (const int64_t start = from(own); start < own)
                pair_product(out + i * out_row, out_row, weights + i * weights_row, weights_row, rows, panel, vectors,
                             start / 2, own / 2, own % 2 != 0);
        });
    }

#if defined(__AMX_BF16__)
    static void score(float *scores, int64_t scores_row, const bf16 *queries, int64_t, const float *panel,
                      int64_t vectors, int64_t d) {
        chunk_product(scores, scores_row, queries, depth(d), panel, vectors, 0, depth(d) / CHUNK);
    }
    template <class Limit>
    static void weigh(float *out, int64_t out_row, const bf16 *weights, int64_t weights_row, int64_t n,
                      const float *panel, int64_t vectors, Limit limit) {
        weigh_chunks(out, out_row, n, vectors, limit, [&](float *sums, int64_t begin, int64_t end) {
            chunk_product(sums, PANEL, weights, weights_row, panel, vectors, begin, end);
        });
        weigh_pairs(out, out_row, weights, weights_row, n, panel, vectors, limit,
                    [](int64_t own) { return own / CHUNK * CHUNK; });
    }
#else
    static void score(float *scores, int64_t scores_row, const bf16 *queries, int64_t n, const float *panel,
                      int64_t vectors, int64_t d) {
        pair_product(scores, scores_row, queries, depth(d), n, panel, vectors, 0, (d + 1) / 2, false);
    }
    template <class Limit>
    static void weigh(float *out, int64_t out_row, const bf16 *weights, int64_t weights_row, int64_t n,
                      const float *panel, int64_t vectors, Limit limit) {
        weigh_pairs(out, out_row, weights, weights_row, n, panel, vectors, limit, [](int64_t) { return int64_t(0); });
    }
#endif
};

} // namespace llaisys::LLAISYS_TIER
