// self_attention(rope(q, pos_ids, theta), k, v, scale). The kernel is that of self_attention, which rotates each query
// on its way into the panel: q is read once and the rotated q never written.
#include "rope.h"
#include "self_attention.h"

#ifdef LLAISYS_ONCE

int32_t llaisysRopeSelfAttention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *pos_ids,
                                 const LlaisysTensor *k, const LlaisysTensor *v, float theta, float scale) {
    using namespace llaisys;
    return guarded("rope_self_attention", [&] {
        check_attention(out, q, k, v, scale);
        check_rope({"q", q}, {"pos_ids", pos_ids}, theta);
        check_output({"out", out}, {{"pos_ids", pos_ids}});
        if (numel(*out) == 0) return;
        run_attention(out, q, k, v, scale, rope_table(*pos_ids, q->shape[2], theta, q->dtype));
    });
}
#endif
