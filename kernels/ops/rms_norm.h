// The norm of one row, shared by rms_norm and the operators that it is fused into.
#pragma once

#include "core/tier.h"

namespace llaisys::LLAISYS_TIER {

// Sum of the squares of a row. Four accumulators, lanes along the row, one reduction at the end.
template <class T>
static inline float sum_of_squares(const T *x, int64_t n) {
    constexpr int N = Vec::N;
    Vec sum[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * N <= n; i += 4 * N)
        for (int j = 0; j < 4; ++j) {
            const Vec v = load(x + i + j * N);
            sum[j] = fma(v, v, sum[j]);
        }
    for (; i + N <= n; i += N) {
        const Vec v = load(x + i);
        sum[0] = fma(v, v, sum[0]);
    }
    if (i < n) {
        const Vec v = load(x + i, n - i);
        sum[1] = fma(v, v, sum[1]);
    }
    return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
static inline void rms_norm_row(T *out, const T *x, const T *weight, int64_t n, float eps) {
    const Vec scale = set1(1.0f / __builtin_sqrtf(sum_of_squares(x, n) / float(n) + eps));
    int64_t i = 0;
    for (; i + Vec::N <= n; i += Vec::N) store(out + i, round_to<T>(load(x + i) * scale) * load(weight + i));
    if (i < n) store(out + i, round_to<T>(load(x + i, n - i) * scale) * load(weight + i, n - i), n - i);
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
