// What is built from the vectors of any tier.
#pragma once

namespace llaisys::LLAISYS_TIER {

// The first n < 2 N elements as load2 orders them, the rest zero.
template <class T>
static inline void load2(const T *p, int64_t n, Vec &a, Vec &b) {
    T part[2 * Vec::N] = {};
    memcpy(part, p, size_t(n) * sizeof(T));
    load2(part, a, b);
}

// `x` rounded to T and widened again: a rounding point of the contract.
template <class T>
static inline Vec round_to(Vec x) {
    if constexpr (sizeof(T) == sizeof(float)) return x;
    T part[Vec::N];
    store(part, x);
    return load(part);
}

// e^x to about 1 ulp, for all x: infinity above 88.7, 0 below -104, NaN for NaN. Cody and Waite's reduction by
// multiples of ln 2 = C1 + C2 and a polynomial of degree 7 (coefficients of Cephes' expf).
static inline Vec exp(Vec x) {
    // NaN passes as the second operand. At -105 the result has rounded to 0, at 89 it has overflowed.
    x = min(set1(89.0f), max(set1(-105.0f), x));
    const Vec n = round_int(x * set1(1.44269504088896341f));
    Vec r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r * r, r) + set1(1.0f);
    return scale2(p, n);
}

// The sums of the lanes of COUNT vectors, many at a time: each in the one order that hsum_parts and hsum_whole have. At
// `out` there is room for COUNT rounded up to whole vectors.
template <int COUNT>
static inline void hsums(float *out, const Vec *v) {
    constexpr int PARTS = (COUNT + 3) / 4, WHOLE = Vec::N / 4; // of the last ones, what is missing repeats another
    Vec parts[PARTS];
    for (int i = 0; i < PARTS; ++i) {
        const auto one = [&](int j) { return v[4 * i + j < COUNT ? 4 * i + j : 4 * i]; };
        parts[i] = hsum_parts(one(0), one(1), one(2), one(3));
    }
    for (int i = 0; i < PARTS; i += WHOLE) {
        const auto part = [&](int j) { return parts[i + j < PARTS ? i + j : i]; };
        if constexpr (WHOLE == 4)
            store(out + 4 * i, hsum_whole(part(0), part(1), part(2), part(3)));
        else if constexpr (WHOLE == 2)
            store(out + 4 * i, hsum_whole(part(0), part(1)));
        else
            store(out + 4 * i, hsum_whole(part(0)));
    }
}

} // namespace llaisys::LLAISYS_TIER
