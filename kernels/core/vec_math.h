// What is built from the vectors of any tier.
#pragma once

namespace llaisys::LLAISYS_TIER {

#if !defined(__AVX512F__)
// The first n < 2 N elements as load2 orders them, the rest zero; nothing behind them is touched.
template <class T>
static inline void load2(const T *p, int64_t n, Vec &a, Vec &b) {
    T part[2 * Vec::N] = {};
    memcpy(part, p, size_t(n) * sizeof(T));
    load2(part, a, b);
}
template <class T>
static inline void store2(T *p, Vec a, Vec b, int64_t n) {
    T part[2 * Vec::N];
    store2(part, a, b);
    memcpy(p, part, size_t(n) * sizeof(T));
}
#endif

// Two vectors, in the order of load2: what element by element kernels work on.
struct Pair {
    Vec a, b;
};
constexpr int64_t PAIR = 2 * Vec::N;

// Calls `body(i, n)` for n elements from i on: n = PAIR, and fewer at the end. The body is to be forced inline, so that
// for all but the end n is a constant and the functions below have no branch in them.
template <class Body>
static inline void for_pairs(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + PAIR <= end; i += PAIR) body(i, PAIR);
    if (i < end) body(i, end - i);
}
#define LLAISYS_INLINE __attribute__((always_inline))

template <class T>
LLAISYS_INLINE static inline Pair load_pair(const T *p, int64_t n) {
    Pair x;
    if (n == PAIR)
        load2(p, x.a, x.b);
    else
        load2(p, n, x.a, x.b);
    return x;
}
template <class T>
LLAISYS_INLINE static inline void store_pair(T *p, Pair x, int64_t n) {
    if (n == PAIR)
        store2(p, x.a, x.b);
    else
        store2(p, x.a, x.b, n);
}
static inline Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
static inline Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
static inline Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
template <class T>
static inline Pair round_to(Pair x) {
    return {round_to<T>(x.a), round_to<T>(x.b)};
}

// e^x to about 1 ulp, for all x: infinity above 88.7, 0 below -104, NaN for NaN. Cody and Waite's reduction by
// multiples of ln 2 = C1 + C2, then a polynomial of degree 6, within 0.05 u of e^r in relative terms.
static inline Vec exp(Vec x) {
    const Vec magic = set1(12582912.0f); // 1.5 * 2^23: adding it leaves no bits for a fraction
    // NaN passes as the second operand. At -105 the result has rounded to 0, at 89 it has overflowed.
    x = min(set1(89.0f), max(set1(-105.0f), x));
    const Vec n = fma(x, set1(1.44269504088896341f), magic) - magic;
    Vec r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = set1(1.3814539415761828e-3f);
    p = fma(p, r, set1(8.36874544620514e-3f));
    p = fma(p, r, set1(4.166838899254799e-2f));
    p = fma(p, r, set1(1.666652113199234e-1f));
    p = fma(p, r, set1(0.4999999403953552f));
    p = fma(p, r * r, r) + set1(1.0f);
    return scale2(p, n);
}

// Copies n bytes, a vector of them at least: bits, not numbers. Calls `beside(i)` before those from byte i on; the last
// vector copies some of them once more.
template <class Beside>
LLAISYS_INLINE static inline void copy_bytes(char *out, const char *x, int64_t n, Beside beside) {
    constexpr int64_t WIDTH = sizeof(Vec);
    const auto copy = [&](int64_t i) {
        beside(i);
        store((float *)(out + i), load((const float *)(x + i)));
    };
    for (int64_t i = 0; i + WIDTH < n; i += WIDTH) copy(i);
    copy(n - WIDTH);
}

// The sums of the lanes of COUNT vectors, many at a time: each in the one order that hsum_parts and hsum_whole have. At
// `out` there is room for COUNT rounded up to whole vectors. What is missing at the end repeats another. No loops, for
// whose sake the vectors would have to lie in memory.
template <int COUNT, int I>
LLAISYS_INLINE static inline Vec hsum_part(const Vec (&v)[COUNT]) {
    constexpr int PART = I < (COUNT + 3) / 4 ? 4 * I : 0;
    return hsum_parts(v[PART], v[PART + 1 < COUNT ? PART + 1 : PART], v[PART + 2 < COUNT ? PART + 2 : PART],
                      v[PART + 3 < COUNT ? PART + 3 : PART]);
}
template <int COUNT, int I = 0>
LLAISYS_INLINE static inline void hsums(float *out, const Vec (&v)[COUNT]) {
    constexpr int WHOLE = Vec::N / 4;
    if constexpr (WHOLE == 4)
        store(out + 4 * I,
              hsum_whole(hsum_part<COUNT, I>(v), hsum_part<COUNT, I + 1>(v), hsum_part<COUNT, I + 2>(v),
                         hsum_part<COUNT, I + 3>(v)));
    else if constexpr (WHOLE == 2)
        store(out + 4 * I, hsum_whole(hsum_part<COUNT, I>(v), hsum_part<COUNT, I + 1>(v)));
    else
        store(out + 4 * I, hsum_whole(hsum_part<COUNT, I>(v)));
    if constexpr (4 * (I + WHOLE) < COUNT) hsums<COUNT, I + WHOLE>(out, v);
}

} // namespace llaisys::LLAISYS_TIER
