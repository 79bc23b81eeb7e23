// The rotation of one head and its table of cosines, shared by rope and rope_self_attention.
#pragma once

#include "core/tier.h"

namespace llaisys {

struct RopeTableArgs {
    const char *pos_ids; // int64, perhaps not aligned
    const float *powers; // [D / 2], theta^(2i/D)
    int64_t half;        // D / 2
    void *table;         // [T, 2, D / 2] of the dtype: cosines, then sines
    int32_t dtype;
};
using RopeTableFn = void(const RopeTableArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

template <class T>
LLAISYS_INLINE static inline void rotate(T *out, const T *x, const T *table, int64_t half, int64_t i, int64_t n) {
    const Pair cosine = load_pair(table + i, n), sine = load_pair(table + half + i, n);
    const Pair a = load_pair(x + i, n), b = load_pair(x + half + i, n);
    store_pair(out + i, round_to<T>(a * cosine) - round_to<T>(b * sine), n);
    store_pair(out + half + i, round_to<T>(b * cosine) + round_to<T>(a * sine), n);
}

// One head: out may be x.
template <class T>
static inline void rope_row(T *out, const T *x, const T *table, int64_t half) {
    for_pairs(0, half, [&](int64_t i, int64_t n) LLAISYS_INLINE { rotate(out, x, table, half, i, n); });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/tensor.h"
#include "core/threads.h"

namespace llaisys {

// The table for these positions. It belongs to the calling thread and is valid until its next call. The last one is
// kept: in a model every layer asks for the same, for queries and for keys.
const void *rope_table(const LlaisysTensor &pos_ids, int64_t head_dim, float theta, int32_t dtype);

void check_rope(const Argument &x, const Argument &pos_ids, float theta);

} // namespace llaisys
#endif
