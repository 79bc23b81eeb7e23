// Rotary position embedding: the halves of each head rotated against each other.
#include "rope.h"

namespace llaisys {

struct RopeArgs {
    char *out;
    const char *x;
    int64_t out_token, out_head, x_token, x_head; // strides in bytes
    int64_t heads, half;
    const float *table;
    int32_t dtype;
};
// Heads [begin, end), counted through all tokens.
using RopeFn = void(const RopeArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

RopeTableFn rope_table_fill;
void rope_table_fill(const RopeTableArgs &args, int64_t begin, int64_t end) { fill_rope_table(args, begin, end); }

RopeFn rope;
void rope(const RopeArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t t = i / args.heads, h = i % args.heads;
            rope_row((T *)(args.out + t * args.out_token + h * args.out_head),
                     (const T *)(args.x + t * args.x_token + h * args.x_head), args.table + 2 * t * args.half,
                     args.half);
        }
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"

#include <algorithm>
#include <vector>

namespace llaisys {

LLAISYS_KERNEL(rope, RopeFn);
LLAISYS_KERNEL(rope_table_fill, RopeTableFn);

// theta^(2i/D) with the exponent and the power rounded to f32, as torch does; pow takes as long as a whole head, so the
// last answer is kept. The angle is the position divided by it. transformers multiplies by the rounded inverse, which
// gives the same f32 in 73 % of the cases and its neighbour in the others; the course divides and asks for 1e-4 of the
// result at position 1023, which the multiplication misses in one element of a million.
static const std::vector<float> &powers(int64_t head_dim, float theta) {
    thread_local std::vector<float> values;
    thread_local int64_t known_dim = -1;
    thread_local float known_theta = 0;
    if (head_dim != known_dim || theta != known_theta) {
        known_dim = -1;
        values.resize(size_t(head_dim / 2));
        for (int64_t i = 0; i < head_dim / 2; ++i)
            values[size_t(i)] = float(std::pow(double(theta), double(float(2 * i) / float(head_dim))));
        known_dim = head_dim;
        known_theta = theta;
    }
    return values;
}

const float *rope_table(const LlaisysTensor &pos_ids, int64_t head_dim, float theta, int32_t dtype) {
    const int64_t tokens = pos_ids.shape[0], half = head_dim / 2;
    auto *table = static_cast<float *>(scratch(SLOT_TABLE, size_t(tokens * head_dim) * sizeof(float)));
    const RopeTableArgs args{static_cast<const char *>(pos_ids.data), powers(head_dim, theta).data(), half, table,
                             dtype};
    const int64_t least = std::max<int64_t>(1, 2048 / std::max<int64_t>(half, 1));
    parallel_for(tokens, grain_for(tokens, least),
                 [&, kernel = rope_table_fill_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return table;
}

void check_rope(const Argument &x, const Argument &pos_ids, float theta) {
    check_ndim(x, 3);
    if (x.tensor->shape[2] % 2 != 0)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected an even head dim, found shape %s", x.name,
             shape_text(*x.tensor).c_str());
    check_dtype(pos_ids, LLAISYS_DTYPE_I64);
    check_ndim(pos_ids, 1);
    check_size(pos_ids, 0, x.tensor->shape[0], "tokens");
    check_last_axis_contiguous({pos_ids});
    if (!(theta > 0.0f) || theta > 3.4e38f)
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "theta: expected a finite number above 0, found %g", double(theta));
}

} // namespace llaisys

int32_t llaisysRope(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *pos_ids, float theta) {
    using namespace llaisys;
    return guarded("rope", [&] {
        const int32_t dtype = check_floats({{"x", x}, {"out", out}});
        check_rope({"x", x}, {"pos_ids", pos_ids}, theta);
        check_same_shape({"out", out}, {"x", x});
        check_last_axis_contiguous({{"out", out}, {"x", x}});
        check_output({"out", out}, {{"x", x}, {"pos_ids", pos_ids}}, {"x"});
        const int64_t size = dtype_size(dtype), heads = x->shape[1], head_dim = x->shape[2];
        if (numel(*x) == 0) return;
        const RopeArgs args{static_cast<char *>(out->data),
                            static_cast<const char *>(x->data),
                            out->strides[0] * size,
                            out->strides[1] * size,
                            x->strides[0] * size,
                            x->strides[1] * size,
                            heads,
                            head_dim / 2,
                            rope_table(*pos_ids, head_dim, theta, dtype),
                            dtype};
        const int64_t count = x->shape[0] * heads, least = std::max<int64_t>(1, 8192 / head_dim);
        parallel_for(count, grain_for(count, least),
                     [&, kernel = rope_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}
#endif
