// The avx2 tier: eight lanes, FMA and F16C. See vec_scalar.h for what each function promises.
#pragma once

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

struct Vec {
    static constexpr int N = 8;
    __m256 v;
};

static inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec zero() { return {_mm256_setzero_ps()}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline float hsum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float hmax(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline uint32_t equal_mask(Vec a, Vec b) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
static inline uint32_t nan_mask(Vec a) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))); }

static inline Vec scale2(Vec x, Vec n) {
    const __m256i bias = _mm256_set1_epi32(127), whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
    const auto power = [&](__m256i k) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, bias), 23)); };
    return {_mm256_mul_ps(_mm256_mul_ps(x.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

// The bf16 nearest to each lane in its upper half, and remains in the lower one; NaN as vec_scalar.h has it.
static inline __m256i bf16_bits(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
static inline Vec clean_nan(Vec x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i clean =
        _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xffff0000))), _mm256_set1_epi32(0x400000));
    return {_mm256_blendv_ps(x.v, _mm256_castsi256_ps(clean), _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q))};
}
static inline __m128i to_bf16(__m256 x) {
    const __m256i all = _mm256_srli_epi32(bf16_bits(x), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

static inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline Vec load(const f16 *p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p))}; }
static inline Vec load(const bf16 *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
static inline void store(float *p, Vec x) { _mm256_storeu_ps(p, x.v); }
static inline void store(f16 *p, Vec x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(bf16 *p, Vec x) { _mm_storeu_si128((__m128i *)p, to_bf16(x.v)); }

template <class T>
static inline Vec load(const T *p, int64_t n) {
    T part[Vec::N] = {};
    memcpy(part, p, size_t(n) * sizeof(T));
    return load(part);
}
template <class T>
static inline void store(T *p, Vec x, int64_t n) {
    T part[Vec::N];
    store(part, x);
    memcpy(p, part, size_t(n) * sizeof(T));
}

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
static inline void load2(const bf16 *p, Vec &a, Vec &b) {
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)p);
    a = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
    b = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))))};
}
static inline void store2(bf16 *p, Vec a, Vec b) {
    const __m256i pairs = _mm256_blend_epi16(_mm256_srli_epi32(bf16_bits(a.v), 16), bf16_bits(b.v), 0xaa);
    _mm256_storeu_si256((__m256i *)p, pairs);
}

// `x` rounded to T and widened again: a rounding point of the contract.
template <class T>
static inline Vec round_to(Vec x) {
    if constexpr (__is_same(T, f16)) return {_mm256_cvtph_ps(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT))};
    if constexpr (__is_same(T, bf16))
        return {_mm256_castsi256_ps(_mm256_and_si256(bf16_bits(x.v), _mm256_set1_epi32(int(0xffff0000))))};
    return x;
}

// For hsums: the sums of the lanes of four vectors within each 128 bits, and of all 128-bit parts of two such vectors.
static inline Vec hsum_parts(Vec a, Vec b, Vec c, Vec d) {
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
    const __m256d x = _mm256_castps_pd(ab), y = _mm256_castps_pd(cd);
    return {_mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)))};
}
static inline Vec hsum_whole(Vec a, Vec b) {
    return {_mm256_add_ps(_mm256_permute2f128_ps(a.v, b.v, 0x20), _mm256_permute2f128_ps(a.v, b.v, 0x31))};
}

// What a transposition is made of, see vec_scalar.h.
static inline Vec load_quarters(const char *p, int64_t step) {
    const __m256 x = _mm256_castps128_ps256(_mm_loadu_ps((const float *)p));
    return {_mm256_insertf128_ps(x, _mm_loadu_ps((const float *)(p + step)), 1)};
}
static inline Vec interleave_low(Vec a, Vec b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
static inline Vec interleave_high(Vec a, Vec b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
static inline Vec pairs_low(Vec a, Vec b) {
    return {_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))};
}
static inline Vec pairs_high(Vec a, Vec b) {
    return {_mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))};
}
static inline void split_lanes(Vec x, const bf16 *, Vec &a, Vec &b) {
    const __m256i pairs = _mm256_castps_si256(x.v);
    a = {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))};
    b = {_mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))))};
}
static inline void split_lanes(Vec x, const f16 *, Vec &a, Vec &b) {
    const __m256i pairs = _mm256_castps_si256(x.v), lower = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
    const auto widened = [](__m256i h) {
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
    };
    a = {widened(lower)};
    b = {widened(_mm256_srli_epi32(pairs, 16))};
}

} // namespace llaisys::LLAISYS_TIER
