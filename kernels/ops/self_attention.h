// What the C entries of self_attention and rope_self_attention share: the kernel is one, with or without rotating q.
#pragma once

#include "core/tier.h"

namespace llaisys {

struct AttentionArgs {
    char *out;
    const char *q, *k, *v;
    int64_t out_token, out_head, q_token, q_head, k_token, k_head, v_token, v_head; // strides in bytes
    int64_t tokens, keys, heads, kv_heads, head_dim;
    float scale;
    const void *table; // of rope.h, to rotate q with; NULL: q is taken as it is
    int32_t dtype;
    float *partial; // results of single blocks, where they are computed apart; see self_attention.cpp
};

} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/tensor.h"

namespace llaisys {

// Checks everything but what rope adds.
void check_attention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k, const LlaisysTensor *v,
                     float scale);
void run_attention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k, const LlaisysTensor *v,
                   float scale, const void *table);

} // namespace llaisys
#endif
