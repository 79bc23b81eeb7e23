// Largest element of each row and its index: the lowest index among equals, and the first NaN wins over everything.
#include "core/tier.h"

namespace llaisys {

struct ArgmaxArgs {
    Rows x;
    int32_t dtype;
};
struct Best {
    int64_t index;
    float value;
};
// The best of the elements [begin, end) of a row, begin < end.
using ArgmaxFn = Best(const ArgmaxArgs &, int64_t row, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

// Index of the first element for which `mask` has a bit.
template <class T, class Mask>
static inline int64_t find(const T *x, int64_t begin, int64_t end, Mask mask) {
    int64_t i = begin;
    for (; i + Vec::N <= end; i += Vec::N)
        if (const uint32_t m = mask(load(x + i))) return i + __builtin_ctz(m);
    const uint32_t m = i < end ? mask(load(x + i, end - i)) & ((1u << (end - i)) - 1) : 0;
    return m ? i + __builtin_ctz(m) : -1;
}

// Two passes, first the value and then its place: the first is a plain maximum at memory speed, the second mostly ends
// early. Carrying indices in lanes along costs three more instructions an element.
template <class T>
static Best best_of(const T *x, int64_t begin, int64_t end) {
    constexpr int N = Vec::N;
    const float lowest = -__builtin_inff();
    Vec best[4] = {set1(lowest), set1(lowest), set1(lowest), set1(lowest)};
    uint32_t nan = 0;
    int64_t i = begin;
    for (; i + 4 * N <= end; i += 4 * N) {
        for (int j = 0; j < 4; ++j) {
            const Vec v = load(x + i + j * N);
            nan |= nan_mask(v);
            best[j] = max(best[j], v);
        }
    }
    for (; i < end; i += N) {
        const int64_t n = end - i < N ? end - i : N;
        T part[N]; // the tail repeats its first element, which changes neither the maximum nor the NaNs
        for (int64_t j = 0; j < N; ++j) memcpy(part + j, x + i + (j < n ? j : 0), sizeof(T));
        const Vec v = load(part);
        nan |= nan_mask(v);
        best[0] = max(best[0], v);
    }
    if (nan) {
        const int64_t at = find(x, begin, end, [](Vec v) { return nan_mask(v); });
        return {at, __builtin_nanf("")};
    }
    const float value = hmax(max(max(best[0], best[1]), max(best[2], best[3])));
    const Vec wanted = set1(value);
    return {find(x, begin, end, [&](Vec v) { return equal_mask(v, wanted); }), value};
}

ArgmaxFn argmax;
Best argmax(const ArgmaxArgs &args, int64_t row, int64_t begin, int64_t end) {
    Best best{};
    with_type(args.dtype, [&]<class T>(T) { best = best_of((const T *)row_at(args.x, row), begin, end); });
    return best;
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>
#include <cstring>

namespace llaisys {

LLAISYS_KERNEL(argmax, ArgmaxFn);

// index and value have the shape of x without its last axis; for a one-dimensional x also [1], as the course has it.
static void check_result(const Argument &result, const LlaisysTensor &x) {
    const auto &t = *result.tensor;
    const bool lead = t.ndim == x.ndim - 1 && std::equal(t.shape, t.shape + t.ndim, x.shape);
    if (!lead && !(x.ndim == 1 && t.ndim == 1 && t.shape[0] == 1))
        fail(LLAISYS_ERROR_SHAPE, "%s: expected the shape of x %s without its last axis, found %s", result.name,
             shape_text(x).c_str(), shape_text(t).c_str());
}

static void check_argmax(LlaisysTensor *index, LlaisysTensor *value, const LlaisysTensor *x) {
    check_floats({{"x", x}, {"value", value}});
    check_dtype({"index", index}, LLAISYS_DTYPE_I64);
    if (x->ndim < 1) fail(LLAISYS_ERROR_SHAPE, "x: expected at least one axis, found shape []");
    if (x->shape[x->ndim - 1] == 0) fail(LLAISYS_ERROR_SHAPE, "x: the last axis has no elements to choose from");
    check_result({"index", index}, *x);
    check_result({"value", value}, *x);
    check_last_axis_contiguous({{"x", x}, {"index", index}, {"value", value}});
    check_output({"index", index}, {{"x", x}, {"value", value}});
    check_output({"value", value}, {{"x", x}});
}

} // namespace llaisys

int32_t llaisysArgmax(LlaisysTensor *index, LlaisysTensor *value, const LlaisysTensor *x) {
    using namespace llaisys;
    return guarded("argmax", [&] {
        check_argmax(index, value, x);
        const ArgmaxArgs args{make_rows(*x), x->dtype};
        Rows out[2] = {};
        make_joint_rows({index, value}, out);
        constexpr int64_t SPAN = 16384;
        const int64_t count = args.x.count, length = args.x.length, spans = (length + SPAN - 1) / SPAN;
        auto *best = static_cast<Best *>(scratch(SLOT_PARTIAL, size_t(count * spans) * sizeof(Best)));
        const auto kernel = argmax_kernel.get();
        const int64_t least = std::max<int64_t>(1, SPAN / std::min(length, SPAN));
        parallel_for(count * spans, grain_for(count * spans, least), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t begin = i % spans * SPAN;
                best[i] = kernel(args, i / spans, begin, std::min(begin + SPAN, length));
            }
        });
        const int64_t size = dtype_size(x->dtype);
        for (int64_t row = 0; row < count; ++row) {
            Best b = best[row * spans];
            for (int64_t s = 1; s < spans; ++s) {
                const Best &c = best[row * spans + s];
                // !(c <= b) holds if c is larger, or a NaN; a NaN that was first stays.
                if (b.value == b.value && !(c.value <= b.value)) b = c;
            }
            const int64_t r = out[0].length, at = row;
            std::memcpy(row_at(out[0], at / r) + at % r * 8, &b.index, 8);
            std::memcpy(row_at(out[1], at / r) + at % r * size, row_at(args.x, row) + b.index * size, size_t(size));
        }
    });
}
#endif
