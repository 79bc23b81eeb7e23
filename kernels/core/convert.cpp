// Copies between f32, f16 and bf16, rounding to nearest even: what loading a checkpoint and handing out logits needs.
#include "core/tier.h"

namespace llaisys {

struct ConvertArgs {
    char *out;
    const char *x;
    int32_t out_dtype, x_dtype;
};
// Elements [begin, end).
using ConvertFn = void(const ConvertArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

ConvertFn convert;
void convert(const ConvertArgs &args, int64_t begin, int64_t end) {
    with_type(args.out_dtype, [&]<class Out>(Out) {
        with_type(args.x_dtype, [&]<class In>(In) {
            auto *out = (Out *)args.out;
            const auto *x = (const In *)args.x;
            const auto value = [](Vec v) { return __is_same(Out, bf16) ? clean_nan(v) : v; };
            int64_t i = begin;
            for (; i + Vec::N <= end; i += Vec::N) store(out + i, value(load(x + i)));
            if (i < end) store(out + i, value(load(x + i, end - i)), end - i);
        });
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/convert.h"
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>
#include <cstring>

namespace llaisys {

LLAISYS_KERNEL(convert, ConvertFn);

static void convert_part(const ConvertArgs &args, ConvertFn *kernel, int64_t begin, int64_t end) {
    const int64_t size = dtype_size(args.x_dtype);
    if (args.out_dtype == args.x_dtype) // bit for bit, NaN payloads too
        std::memcpy(args.out + begin * size, args.x + begin * size, size_t((end - begin) * size));
    else
        kernel(args, begin, end);
}

void convert_elements(void *out, int32_t out_dtype, const void *x, int32_t x_dtype, int64_t count) {
    const ConvertArgs args{static_cast<char *>(out), static_cast<const char *>(x), out_dtype, x_dtype};
    // Parts of bounded size, so that a long copy can be interrupted.
    const int64_t grain = std::min<int64_t>(grain_for(count, 32768), 1 << 22);
    parallel_for(count, grain, [&, kernel = convert_kernel.get()](int64_t begin, int64_t end) {
        convert_part(args, kernel, begin, end);
    });
}

void convert_elements_alone(void *out, int32_t out_dtype, const void *x, int32_t x_dtype, int64_t count) {
    const ConvertArgs args{static_cast<char *>(out), static_cast<const char *>(x), out_dtype, x_dtype};
    convert_part(args, convert_kernel.get(), 0, count);
}

} // namespace llaisys
#endif
