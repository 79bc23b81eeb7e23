// The avx512 tier (F, BW, DQ, VL): sixteen lanes. See vec_scalar.h for what each function promises.
#pragma once

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

struct Vec {
    static constexpr int N = 16;
    __m512 v;
};

static inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec zero() { return {_mm512_setzero_ps()}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline float hsum(Vec a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float hmax(Vec a) {
    const __m256 h = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline uint32_t equal_mask(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
static inline uint32_t nan_mask(Vec a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }

static inline Vec scale2(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

// The bf16 nearest to each lane in its upper half, and remains in the lower one; NaN as vec_scalar.h has it.
static inline __m512i bf16_bits(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
static inline Vec clean_nan(Vec x) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i clean =
        _mm512_or_si512(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xffff0000))), _mm512_set1_epi32(0x400000));
    return {_mm512_mask_mov_ps(x.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_castsi512_ps(clean))};
}
static inline __m256i to_bf16(__m512 x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x), 16)); }
static inline __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }

static inline Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }

static inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const f16 *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }
static inline Vec load(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
static inline Vec load(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline Vec load(const f16 *p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
static inline Vec load(const bf16 *p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

static inline __m256i to_f16(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
static inline void store(float *p, Vec x) { _mm512_storeu_ps(p, x.v); }
static inline void store(f16 *p, Vec x) { _mm256_storeu_si256((__m256i *)p, to_f16(x.v)); }
static inline void store(bf16 *p, Vec x) { _mm256_storeu_si256((__m256i *)p, to_bf16(x.v)); }
static inline void store(float *p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
static inline void store(f16 *p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_f16(x.v)); }
static inline void store(bf16 *p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(x.v)); }

template <class T>
static inline void load2(const T *p, Vec &a, Vec &b) {
    a = load(p);
    b = load(p + Vec::N);
}
template <class T>
static inline void store2(T *p, Vec a, Vec b) {
    store(p, a);
    store(p + Vec::N, b);
}
// bf16: a shift gives the even elements and a mask the odd ones, one instruction each instead of two; a shift and a
// blend put them together again, without a shuffle.
static inline void split_pairs(__m512i pairs, Vec &a, Vec &b) {
    a = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    b = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))))};
}
static inline __m512i join_pairs(Vec a, Vec b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bf16_bits(a.v), 16), bf16_bits(b.v));
}
static inline void load2(const bf16 *p, Vec &a, Vec &b) { split_pairs(_mm512_loadu_si512(p), a, b); }
static inline void store2(bf16 *p, Vec a, Vec b) { _mm512_storeu_si512(p, join_pairs(a, b)); }

// The first n < 2 N elements, the rest zero; nothing behind them is touched.
template <class T>
static inline void load2(const T *p, int64_t n, Vec &a, Vec &b) {
    a = load(p, n < Vec::N ? n : Vec::N);
    b = n > Vec::N ? load(p + Vec::N, n - Vec::N) : zero();
}
template <class T>
static inline void store2(T *p, Vec a, Vec b, int64_t n) {
    store(p, a, n < Vec::N ? n : Vec::N);
    if (n > Vec::N) store(p + Vec::N, b, n - Vec::N);
}
static inline __mmask32 first_pairs(int64_t n) { return __mmask32((uint64_t(1) << n) - 1); }
static inline void load2(const bf16 *p, int64_t n, Vec &a, Vec &b) {
    split_pairs(_mm512_maskz_loadu_epi16(first_pairs(n), p), a, b);
}
static inline void store2(bf16 *p, Vec a, Vec b, int64_t n) {
    _mm512_mask_storeu_epi16(p, first_pairs(n), join_pairs(a, b));
}

// `x` rounded to T and widened again: a rounding point of the contract.
template <class T>
static inline Vec round_to(Vec x) {
    if constexpr (__is_same(T, f16)) return {_mm512_cvtph_ps(to_f16(x.v))};
    if constexpr (__is_same(T, bf16))
        return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(x.v), _mm512_set1_epi32(int(0xffff0000))))};
    return x;
}

// For hsums: the sums of the lanes of four vectors within each 128 bits, and of all 128-bit parts of two such vectors.
static inline Vec hsum_parts(Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)))};
}
static inline Vec fold(Vec a, Vec b) {
    return {_mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x88), _mm512_shuffle_f32x4(a.v, b.v, 0xdd))};
}
static inline Vec hsum_whole(Vec a, Vec b, Vec c, Vec d) { return fold(fold(a, b), fold(c, d)); }

// What a transposition is made of, see vec_scalar.h.
static inline Vec load_quarters(const char *p, int64_t step) {
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps((const float *)p));
    x = _mm512_insertf32x4(x, _mm_loadu_ps((const float *)(p + step)), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps((const float *)(p + 2 * step)), 2);
    return {_mm512_insertf32x4(x, _mm_loadu_ps((const float *)(p + 3 * step)), 3)};
}
static inline Vec interleave_low(Vec a, Vec b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
static inline Vec interleave_high(Vec a, Vec b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
static inline Vec pairs_low(Vec a, Vec b) {
    return {_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
static inline Vec pairs_high(Vec a, Vec b) {
    return {_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
static inline void split_lanes(Vec x, const bf16 *, Vec &a, Vec &b) { split_pairs(_mm512_castps_si512(x.v), a, b); }
static inline void split_lanes(Vec x, const f16 *, Vec &a, Vec &b) {
    const __m512i pairs = _mm512_castps_si512(x.v);
    a = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs))};
    b = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)))};
}

} // namespace llaisys::LLAISYS_TIER
