// The portable tier: four lanes of the compiler's generic vectors, without FMA, on any processor.
#pragma once

namespace llaisys::LLAISYS_TIER {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

struct Vec {
    static constexpr int N = 4;
    f32x4 v;
};

static inline Vec set1(float x) { return {f32x4{x, x, x, x}}; }
static inline Vec zero() { return set1(0.0f); }
static inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
static inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
static inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
static inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// b where either is NaN, as the x86 instruction has it.
static inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
static inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
static inline float hsum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
static inline float hmax(Vec a) {
    const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
    return x > y ? x : y;
}
// One bit per lane.
static inline uint32_t mask_of(i32x4 m) {
    return uint32_t(m[0] & 1) | uint32_t(m[1] & 2) | uint32_t(m[2] & 4) | uint32_t(m[3] & 8);
}
static inline uint32_t equal_mask(Vec a, Vec b) { return mask_of(a.v == b.v); }
static inline uint32_t nan_mask(Vec a) { return mask_of(a.v != a.v); }

// x 2^n for integers n in [-252, 254].
static inline Vec scale2(Vec x, Vec n) {
    const i32x4 whole = __builtin_convertvector(n.v, i32x4), half = whole >> 1, rest = whole - half;
    return {x.v * (f32x4)((half + 127) << 23) * (f32x4)((rest + 127) << 23)};
}

static inline u32x4 widen(const void *p) {
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return u32x4{h[0], h[1], h[2], h[3]};
}

static inline f32x4 from_f16(u32x4 h) {
    const u32x4 sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
    // Normal numbers: move the fields and correct the bias. Subnormals: the integer times 2^-24.
    const u32x4 normal = (magnitude << 13) + (112u << 23);
    const u32x4 special = (magnitude << 13) | 0x7f800000; // infinity and NaN
    const u32x4 small = (u32x4)(__builtin_convertvector((i32x4)magnitude, f32x4) * 0x1p-24f);
    const u32x4 is_small = (u32x4)(magnitude < 0x0400), is_special = (u32x4)(magnitude >= 0x7c00);
    return (f32x4)(sign | (is_small & small) | (is_special & special) | (~is_small & ~is_special & normal));
}

static inline uint16_t to_f16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff)); // NaN stays NaN, quiet
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);                            // rounds to 2^16 or more
    if (magnitude < 0x38800000) {                                                           // below 2^-14
        float y;
        memcpy(&y, &magnitude, 4);
        y += 0.5f; // the unit in the last place of [0.5, 1) is 2^-24, that of f16's subnormals
        memcpy(&bits, &y, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

// Storing and rounding to bf16 takes NaNs as they come out of arithmetic on bf16: quiet, with nothing in the lower half
// that a carry could come from. Where others may come (from memory, as f32 or f16), clean_nan makes them so.
static inline u32x4 to_bf16(f32x4 x) {
    const u32x4 bits = (u32x4)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline Vec clean_nan(Vec x) {
    const u32x4 bits = (u32x4)x.v, nan = (u32x4)(x.v != x.v);
    return {(f32x4)((nan & ((bits & 0xffff0000) | 0x400000)) | (~nan & bits))};
}

static inline Vec load(const float *p) {
    Vec r;
    memcpy(&r.v, p, 16);
    return r;
}
static inline Vec load(const f16 *p) { return {from_f16(widen(p))}; }
static inline Vec load(const bf16 *p) { return {(f32x4)(widen(p) << 16)}; }

static inline void store(float *p, Vec x) { memcpy(p, &x.v, 16); }
static inline void store(f16 *p, Vec x) {
    const uint16_t h[4] = {to_f16(x.v[0]), to_f16(x.v[1]), to_f16(x.v[2]), to_f16(x.v[3])};
    memcpy(p, h, sizeof h);
}
static inline void store(bf16 *p, Vec x) {
    const u32x4 r = to_bf16(x.v);
    const uint16_t h[4] = {uint16_t(r[0]), uint16_t(r[1]), uint16_t(r[2]), uint16_t(r[3])};
    memcpy(p, h, sizeof h);
}

// The first n < N elements, the rest zero; nothing behind them is touched.
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

// 2 N elements as two vectors, in the order that is cheapest for the type: sums over them run in that order everywhere.
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

// `x` rounded to T and widened again: a rounding point of the contract.
template <class T>
static inline Vec round_to(Vec x) {
    if constexpr (__is_same(T, f16)) {
        const u32x4 h = {to_f16(x.v[0]), to_f16(x.v[1]), to_f16(x.v[2]), to_f16(x.v[3])};
        return {from_f16(h)};
    }
    if constexpr (__is_same(T, bf16)) return {(f32x4)(to_bf16(x.v) << 16)};
    return x;
}

// For hsums: the sums of the lanes of four vectors.
static inline Vec hsum_parts(Vec a, Vec b, Vec c, Vec d) { return {f32x4{hsum(a), hsum(b), hsum(c), hsum(d)}}; }
static inline Vec hsum_whole(Vec a) { return a; }

// What a transposition is made of. 16 bytes each from p, p + step, ..., as many as a vector holds.
static inline Vec load_quarters(const char *p, int64_t) { return load((const float *)p); }
// Of each 16 bytes of a and b in turn: the lower two lanes, the upper two; and the same in steps of 8 bytes.
static inline Vec interleave_low(Vec a, Vec b) { return {f32x4{a.v[0], b.v[0], a.v[1], b.v[1]}}; }
static inline Vec interleave_high(Vec a, Vec b) { return {f32x4{a.v[2], b.v[2], a.v[3], b.v[3]}}; }
static inline Vec pairs_low(Vec a, Vec b) { return {f32x4{a.v[0], a.v[1], b.v[0], b.v[1]}}; }
static inline Vec pairs_high(Vec a, Vec b) { return {f32x4{a.v[2], a.v[3], b.v[2], b.v[3]}}; }
// The lower and the upper element of the two that each lane holds, widened.
static inline void split_lanes(Vec x, const bf16 *, Vec &a, Vec &b) {
    a = {(f32x4)((u32x4)x.v << 16)};
    b = {(f32x4)((u32x4)x.v & 0xffff0000)};
}
static inline void split_lanes(Vec x, const f16 *, Vec &a, Vec &b) {
    a = {from_f16((u32x4)x.v & 0xffff)};
    b = {from_f16((u32x4)x.v >> 16)};
}

} // namespace llaisys::LLAISYS_TIER
