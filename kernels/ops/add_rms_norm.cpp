// The residual connection and the norm behind it in one pass: sum = r(a + b), out = rms_norm(sum, weight, eps).
#include "core/tier.h"
#include "rms_norm.h"

namespace llaisys {

struct AddRmsNormArgs {
    Rows out, sum, a, b;
    const void *weight;
    float eps;
    int32_t dtype;
};
// Rows [begin, end).
using AddRmsNormFn = void(const AddRmsNormArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

AddRmsNormFn add_rms_norm;
void add_rms_norm(const AddRmsNormArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        const int64_t n = args.a.length;
        for (int64_t i = begin; i < end; ++i) {
            auto *sum = (T *)row_at(args.sum, i);
            const auto *a = (const T *)row_at(args.a, i), *b = (const T *)row_at(args.b, i);
            const auto pair = [&](int64_t j, int64_t count) LLAISYS_INLINE {
                const Pair x = round_to<T>(load_pair(a + j, count) + load_pair(b + j, count));
                store_pair(sum + j, x, count);
                return x;
            };
            scale_row((T *)row_at(args.out, i), sum, (const T *)args.weight, n, sum_of_squares(n, pair), args.eps);
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

LLAISYS_KERNEL(add_rms_norm, AddRmsNormFn);

static void check_add_rms_norm(LlaisysTensor *out, LlaisysTensor *sum, const LlaisysTensor *a, const LlaisysTensor *b,
                               const LlaisysTensor *weight, float eps) {
    check_floats({{"a", a}, {"b", b}, {"weight", weight}, {"sum", sum}, {"out", out}});
    if (a->ndim < 1) fail(LLAISYS_ERROR_SHAPE, "a: expected at least one axis, found shape []");
    check_same_shape({"b", b}, {"a", a});
    check_same_shape({"sum", sum}, {"a", a});
    check_same_shape({"out", out}, {"a", a});
    check_ndim({"weight", weight}, 1);
    check_size({"weight", weight}, 0, a->shape[a->ndim - 1], "row length of a");
    check_last_axis_contiguous({{"out", out}, {"sum", sum}, {"a", a}, {"b", b}, {"weight", weight}});
    check_eps(eps);
    check_output({"sum", sum}, {{"a", a}, {"b", b}, {"weight", weight}}, {"a", "b"});
    check_output({"out", out}, {{"sum", sum}, {"a", a}, {"b", b}, {"weight", weight}});
}

} // namespace llaisys

int32_t llaisysAddRmsNorm(LlaisysTensor *out, LlaisysTensor *sum, const LlaisysTensor *a, const LlaisysTensor *b,
                          const LlaisysTensor *weight, float eps) {
    using namespace llaisys;
    return guarded("add_rms_norm", [&] {
        check_add_rms_norm(out, sum, a, b, weight, eps);
        const AddRmsNormArgs args{make_rows(*out), make_rows(*sum), make_rows(*a), make_rows(*b), weight->data, eps,
                                  a->dtype};
        if (args.a.length == 0) return;
        const int64_t count = args.a.count, least = std::max<int64_t>(1, 16384 / args.a.length);
        parallel_for(count, grain_for(count, least),
                     [&, kernel = add_rms_norm_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}
#endif
