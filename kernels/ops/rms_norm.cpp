// out = r(r(x / sqrt(mean(x^2) + eps)) * weight), row by row.
#include "core/tier.h"
#include "rms_norm.h"

namespace llaisys {

struct RmsNormArgs {
    Rows out, x;
    const void *weight;
    float eps;
    int32_t dtype;
};
// Rows [begin, end).
using RmsNormFn = void(const RmsNormArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

RmsNormFn rms_norm;
void rms_norm(const RmsNormArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        const int64_t n = args.x.length;
        for (int64_t i = begin; i < end; ++i) {
            const auto *x = (const T *)row_at(args.x, i);
            const auto pair = [&](int64_t j, int64_t count) LLAISYS_INLINE { return load_pair(x + j, count); };
            scale_row((T *)row_at(args.out, i), x, (const T *)args.weight, n, sum_of_squares(n, pair), args.eps);
        }
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL(rms_norm, RmsNormFn);

static void check_rms_norm(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight, float eps) {
    check_floats({{"x", x}, {"weight", weight}, {"out", out}});
    if (x->ndim < 1) fail(LLAISYS_ERROR_SHAPE, "x: expected at least one axis, found shape []");
    check_ndim({"weight", weight}, 1);
    check_size({"weight", weight}, 0, x->shape[x->ndim - 1], "row length of x");
    check_same_shape({"out", out}, {"x", x});
    check_last_axis_contiguous({{"out", out}, {"x", x}, {"weight", weight}});
    check_eps(eps);
    check_output({"out", out}, {{"x", x}, {"weight", weight}}, {"x"});
}

} // namespace llaisys

int32_t llaisysRmsNorm(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight, float eps) {
    using namespace llaisys;
    return guarded("rms_norm", [&] {
        check_rms_norm(out, x, weight, eps);
        const RmsNormArgs args{make_rows(*out), make_rows(*x), weight->data, eps, x->dtype};
        if (args.x.length == 0) return;
        const int64_t count = args.x.count, least = std::max<int64_t>(1, 16384 / args.x.length);
        parallel_for(count, grain_for(count, least),
                     [&, kernel = rms_norm_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}
#endif
