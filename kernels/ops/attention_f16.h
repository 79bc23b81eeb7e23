// Attention in f16 with products of AMX tiles: queries, keys, weights and values in two bf16 parts each.
//
// A product of two numbers is four of their parts, added to one sum. Keys behind the last whole chunk of 32 are
// multiplied in f32. On Intel's cores FMA in f32 gives 0.4 TFLOP/s, a quarter of what the tiles have for four products.
//
// A row lies as [chunk of 32][part][32], a panel as [pair][part][column]. Infinities and NaNs do not come apart: where
// a sum of parts is not finite, the element is added up once more in f32.
#pragma once

#include "attention_bf16.h"
#include "f16_parts.h"

namespace llaisys::LLAISYS_TIER {

// An infinity or a NaN is its high part alone.
static inline __m512i finite_part(Vec x, Vec low) {
    return _mm512_maskz_mov_epi32(finite_mask(x), _mm512_castps_si512(low.v));
}
// 16 elements from `at` on of a row in parts, both rounded: that keeps 17 bits of a weight, and all of a query.
static inline void store_parts(bf16 *row, int64_t at, Vec x) {
    const __m256i high = __m256i(_mm512_cvtneps_pbh(x.v));
    const __m512i low = finite_part(x, x - widen(high));
    bf16 *to = row + at / CHUNK * 2 * CHUNK + at % CHUNK;
    _mm256_storeu_si256((__m256i *)to, high);
    _mm256_storeu_si256((__m256i *)(to + CHUNK), __m256i(_mm512_cvtneps_pbh(_mm512_castsi512_ps(low))));
}
static inline float element(const bf16 *row, int64_t at) {
    const bf16 *p = row + at / CHUNK * 2 * CHUNK + at % CHUNK;
    const uint32_t bits[2] = {uint32_t(p[0].bits) << 16, uint32_t(p[CHUNK].bits) << 16};
    float part[2];
    memcpy(part, bits, sizeof part);
    return part[0] + part[1];
}
// Rows of a panel for the elements 2 * pair and 2 * pair + 1.
static inline void put_pair(float *panel, int64_t pair, Vec lower, Vec upper) {
    const F16Parts a = parts_of(lower), b = parts_of(upper);
    _mm512_storeu_si512(panel + 2 * pair * PANEL, paired(a.high, b.high));
    _mm512_storeu_si512(panel + (2 * pair + 1) * PANEL, paired(finite_part(lower, a.low), finite_part(upper, b.low)));
}
static inline Vec panel_element(const float *panel, int64_t k) {
    const float *p = panel + k / 2 * 2 * PANEL;
    const auto part = [&](const float *at) {
        const __m512i pair = _mm512_loadu_si512(at);
        return Vec{_mm512_castsi512_ps(k % 2 ? _mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000)))
                                             : _mm512_slli_epi32(pair, 16))};
    };
    return part(p) + part(p + PANEL);
}

// out[m, :] (+)= sum over elements in [begin, end) of a[m, k] panel[k, :] in f32.
template <int M>
static inline void plain_tile(float *out, int64_t out_row, const bf16 *a, int64_t a_row, const float *panel,
                              int64_t vectors, int64_t begin, int64_t end) {
    for (int64_t c = 0; c < vectors * Vec::N; c += Vec::N) {
        Vec sum[M];
        for (int m = 0; m < M; ++m) sum[m] = begin == 0 ? zero() : load(out + m * out_row + c);
        for (int64_t k = begin; k < end; ++k) {
            const Vec column = panel_element(panel + c, k);
            for (int m = 0; m < M; ++m) sum[m] = fma(set1(element(a + m * a_row, k)), column, sum[m]);
        }
        for (int m = 0; m < M; ++m) store(out + m * out_row + c, sum[m]);
    }
}
template <int M = TILE_ROWS>
static inline void plain_product(float *out, int64_t out_row, const bf16 *a, int64_t a_row, int64_t rows,
                                 const float *panel, int64_t vectors, int64_t begin, int64_t end) {
    if constexpr (M > 1) {
        if (rows < M) return plain_product<M - 1>(out, out_row, a, a_row, rows, panel, vectors, begin, end);
    }
    plain_tile<M>(out, out_row, a, a_row, panel, vectors, begin, end);
}
// The elements of a row that came out infinite or NaN once more, over the first `end` elements.
static inline void mend_row(float *out, const bf16 *a, const float *panel, int64_t vectors, int64_t end) {
    for (int64_t c = 0; c < vectors * Vec::N; c += Vec::N) {
        const Vec sum = load(out + c);
        const __mmask16 finite = finite_mask(sum);
        if (finite == 0xffff) continue;
        float again[Vec::N];
        plain_tile<1>(again, 0, a, 0, panel + c, 1, 0, end);
        store(out + c, Vec{_mm512_mask_mov_ps(load(again).v, finite, sum.v)});
    }
}

// chunk_product in parts: tiles 4 and 5 hold those of the rows, 6 and 7 those of the panel.
static inline void parts_product(float *out, int64_t out_row, const bf16 *a, int64_t a_row, const float *panel,
                                 int64_t vectors, int64_t begin, int64_t end) {
    chunk_sums(
        out, out_row, vectors, begin, end,
        [&](int64_t c) {
            tile_load<4>(a + c * 2 * CHUNK, a_row * 2);
            tile_load<5>(a + c * 2 * CHUNK + CHUNK, a_row * 2);
        },
        [&]<int N>(int64_t c) {
            const float *b = panel + c * CHUNK * PANEL + 16 * N;
            tile_load<6>(b, 2 * PANEL * 4);
            tile_dot<N, 4, 6>();
            tile_dot<N, 5, 6>();
            tile_load<7>(b + PANEL, 2 * PANEL * 4);
            tile_dot<N, 4, 7>();
            tile_dot<N, 5, 7>();
        });
}

template <>
struct AttentionMath<f16> : PanelMath {
    using Factor = bf16;
    static constexpr int64_t PARTS = 2;
    static int64_t depth(int64_t d) { return PARTS * ((d + CHUNK - 1) / CHUNK * CHUNK); }

    static void query(bf16 *to, const f16 *q, int64_t d) {
        for (int64_t c = 0; c < depth(d) / PARTS; c += Vec::N)
            store_parts(to, c, c + Vec::N <= d ? load(q + c) : load(q + c, d > c ? d - c : 0));
    }
    static void weight(bf16 *row, int64_t at, Vec e) { store_parts(row, at, e); }

    static void keys(float *panel, const char *k, int64_t k_bytes, int64_t count, int64_t d, Ahead::Share share) {
        transpose_keys<f16, true>(panel, k, k_bytes, count, d, share);
        // From the last pair on, its two rows never cover one that is still to come.
        for (int64_t pair = depth(d) / PARTS / 2; pair-- > 0;)
            for (int64_t c = 0; c < count; c += Vec::N) {
                Vec lower, upper;
                split_lanes(load(panel + pair * PANEL + c), (const f16 *)nullptr, lower, upper);
                put_pair(panel + c, pair, lower, upper);
            }
    }
    static void values(float *panel, const char *v, int64_t v_bytes, int64_t count, int64_t begin, int64_t end,
                       Ahead::Share share) {
        const int64_t lines = share.each((count + 1) / 2);
        for (int64_t j = 0; j < count; j += 2) {
            share.ahead.ask(lines);
            const auto *lower = (const f16 *)(v + j * v_bytes), *upper = (const f16 *)(v + (j + 1) * v_bytes);
            for (int64_t c = begin; c < end; c += Vec::N) {
                const int64_t n = end - c < Vec::N ? end - c : Vec::N;
                put_pair(panel + c - begin, j / 2, load(lower + c, n), j + 1 < count ? load(upper + c, n) : zero());
            }
        }
    }

    static void score(float *scores, int64_t scores_row, const bf16 *queries, int64_t n, const float *panel,
                      int64_t vectors, int64_t d) {
        const int64_t row = depth(d);
        parts_product(scores, scores_row, queries, row, panel, vectors, 0, row / PARTS / CHUNK);
        for (int64_t i = 0; i < n; ++i) mend_row(scores + i * scores_row, queries + i * row, panel, vectors, d);
    }
    template <class Limit>
    static void weigh(float *out, int64_t out_row, const bf16 *weights, int64_t weights_row, int64_t n,
                      const float *panel, int64_t vectors, Limit limit) {
        weigh_chunks(out, out_row, n, vectors, limit, [&](float *sums, int64_t begin, int64_t end) {
            parts_product(sums, PANEL, weights, weights_row, panel, vectors, begin, end);
        });
        same_keys(n, limit, [&](int64_t i, int64_t rows, int64_t own) {
            const bf16 *a = weights + i * weights_row;
            if (const int64_t start = own / CHUNK * CHUNK; start < own)
                plain_product(out + i * out_row, out_row, a, weights_row, rows, panel, vectors, start, own);
            for (int64_t r = 0; r < rows; ++r)
                mend_row(out + (i + r) * out_row, a + r * weights_row, panel, vectors, own);
        });
    }
};

} // namespace llaisys::LLAISYS_TIER
