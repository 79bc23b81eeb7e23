// out[t, :] = weight[index[t], :]
#include "core/tier.h"

namespace llaisys {

struct EmbeddingArgs {
    Rows out, weight;
    const char *index; // int64, perhaps not aligned
    int64_t row_bytes;
};
// Rows [begin, end) of the output.
using EmbeddingFn = void(const EmbeddingArgs &, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

EmbeddingFn embedding;
void embedding(const EmbeddingArgs &args, int64_t begin, int64_t end) {
    const int64_t n = args.row_bytes;
    const auto row = [&](int64_t t) {
        int64_t i;
        memcpy(&i, args.index + t * 8, 8);
        return row_at(args.weight, i);
    };
    for (int64_t t = begin; t < end; ++t) {
        // Where the next row lies only the index tells, so it is asked for while this one is copied: with memcpy, which
        // does not, 512 rows of 896 in f32 took 23 us instead of 21, in 16 bits 13 instead of 12.
        const char *x = row(t), *next = row(t + 1 < end ? t + 1 : t);
        char *out = row_at(args.out, t);
        if (n < int64_t(sizeof(Vec)))
            memcpy(out, x, size_t(n));
        else
            copy_bytes(out, x, n, [&](int64_t i) { __builtin_prefetch(next + i); });
    }
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

LLAISYS_KERNEL(embedding, EmbeddingFn);

static void check_embedding(LlaisysTensor *out, const LlaisysTensor *index, const LlaisysTensor *weight) {
    check_floats({{"weight", weight}, {"out", out}});
    check_dtype({"index", index}, LLAISYS_DTYPE_I64);
    check_ndim({"index", index}, 1);
    check_ndim({"weight", weight}, 2);
    check_ndim({"out", out}, 2);
    check_size({"out", out}, 0, index->shape[0], "length of index");
    check_size({"out", out}, 1, weight->shape[1], "row length of weight");
    check_last_axis_contiguous({{"out", out}, {"index", index}, {"weight", weight}});
    check_output({"out", out}, {{"index", index}, {"weight", weight}});
}

} // namespace llaisys

int32_t llaisysEmbedding(LlaisysTensor *out, const LlaisysTensor *index, const LlaisysTensor *weight) {
    using namespace llaisys;
    return guarded("embedding", [&] {
        check_embedding(out, index, weight);
        const EmbeddingArgs args{make_rows(*out), make_rows(*weight), static_cast<const char *>(index->data),
                                 weight->shape[1] * dtype_size(weight->dtype)};
        const int64_t count = index->shape[0];
        const auto row = [&](int64_t t) {
            int64_t i;
            std::memcpy(&i, args.index + t * 8, 8);
            return i;
        };
        const auto outside = [&](int64_t i) { return uint64_t(i) >= uint64_t(weight->shape[0]); };
        bool any = false; // without a jump out, several at a time
        for (int64_t t = 0; t < count; ++t) any |= outside(row(t));
        if (any) {
            int64_t t = 0;
            while (!outside(row(t))) ++t;
            fail(LLAISYS_ERROR_INDEX, "index: expected 0 to %lld, found %lld at position %lld",
                 (long long)weight->shape[0] - 1, (long long)row(t), (long long)t);
        }
        if (args.row_bytes == 0) return;
        const int64_t least = std::max<int64_t>(1, 32768 / args.row_bytes);
        parallel_for(count, grain_for(count, least),
                     [&, kernel = embedding_kernel.get()](int64_t begin, int64_t end) { kernel(args, begin, end); });
    });
}
#endif
