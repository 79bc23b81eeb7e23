// The norm of one row, shared by rms_norm and the operators that it is fused into.
#pragma once

#include "core/tier.h"

namespace llaisys::LLAISYS_TIER {

// Sum of the squares of n elements, which `pair(i, n)` gives two vectors at a time. Four accumulators, lanes along the
// row, one reduction at the end.
template <class Pairs>
static inline float sum_of_squares(int64_t n, Pairs pair) {
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    const auto add = [&](int at, Pair x) LLAISYS_INLINE {
        sum[at] = fma(x.a, x.a, sum[at]);
        sum[at + 1] = fma(x.b, x.b, sum[at + 1]);
    };
    int64_t i = 0;
    for (; i + 2 * PAIR <= n; i += 2 * PAIR) {
        add(0, pair(i, PAIR));
        add(2, pair(i + PAIR, PAIR));
    }
    for_pairs(i, n, [&](int64_t j, int64_t count) LLAISYS_INLINE { add(0, pair(j, count)); });
    return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The row x, of n elements, normalised, given the sum of its squares.
template <class T>
static inline void scale_row(T *out, const T *x, const T *weight, int64_t n, float squares, float eps) {
    const Vec scale = set1(1.0f / __builtin_sqrtf(squares / float(n) + eps));
    for_pairs(0, n, [&](int64_t i, int64_t count) LLAISYS_INLINE {
        const Pair normal = load_pair(x + i, count) * Pair{scale, scale};
        store_pair(out + i, round_to<T>(normal) * load_pair(weight + i, count), count);
    });
}

} // namespace llaisys::LLAISYS_TIER

#ifdef LLAISYS_ONCE
#include "core/status.h"

namespace llaisys {

inline void check_eps(float eps) {
    if (!(eps >= 0.0f) || eps > 3.4e38f)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "eps: expected a finite number, not negative, found %g", double(eps));
}

} // namespace llaisys
#endif
