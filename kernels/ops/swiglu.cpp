// out = r(r(silu(gate)) * up), element by element; silu(x) = x / (1 + exp(-x)).
#include "core/tier.h"

namespace llaisys {

struct SwigluArgs {
    Rows out, gate, up;
    int32_t dtype;
};
using SwigluFn = void(const SwigluArgs &, int64_t row, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

template <class T>
static inline Vec gated(Vec gate, Vec up) {
    return round_to<T>(gate / (set1(1.0f) + exp(zero() - gate))) * up;
}

SwigluFn swiglu;
void swiglu(const SwigluArgs &args, int64_t row, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        auto *out = (T *)row_at(args.out, row);
        const auto *gate = (const T *)row_at(args.gate, row), *up = (const T *)row_at(args.up, row);
        int64_t i = begin;
        for (; i + Vec::N <= end; i += Vec::N) store(out + i, gated<T>(load(gate + i), load(up + i)));
        if (i < end) store(out + i, gated<T>(load(gate + i, end - i), load(up + i, end - i)), end - i);
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/elementwise.h"

namespace llaisys { LLAISYS_KERNEL(swiglu, SwigluFn); }

int32_t llaisysSwiglu(LlaisysTensor *out, const LlaisysTensor *gate, const LlaisysTensor *up) {
    using namespace llaisys;
    return guarded("swiglu", [&] {
        SwigluArgs args;
        args.dtype = check_elementwise({"out", out}, {"gate", gate}, {"up", up}, {"gate", "up"});
        Rows rows[3] = {};
        make_joint_rows({out, gate, up}, rows);
        args.out = rows[0], args.gate = rows[1], args.up = rows[2];
        for_each_span(args.out, [&, kernel = swiglu_kernel.get()](int64_t row, int64_t begin, int64_t end) {
            kernel(args, row, begin, end);
        });
    });
}
#endif
