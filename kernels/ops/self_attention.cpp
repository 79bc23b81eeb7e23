// Causal attention with grouped query heads, out = softmax(scale q k^T + mask) v.
//
// The keys are walked in blocks of KEYS, counted from position 0. A block gives each row (a query token and head) its
// maximum m, its sum of exponentials l and its weighted sum of values; merge() folds the blocks into the row's state in
// ascending order. That fixes the order of every sum, whatever rows are computed together and whether the blocks of a
// row are walked by one thread or computed apart by several (which a single token over a long cache needs).
#include "self_attention.h"
#include "linear.h"
#include "rope.h"

namespace llaisys {

constexpr int64_t KEYS = 128;

// Floats of scratch memory for `tokens` tokens of one kv head, and of one row's partial result for a block.
using AttentionWorkFn = int64_t(const AttentionArgs &, int64_t tokens);
using AttentionPartialFn = int64_t(const AttentionArgs &);
// Tokens [begin, end) of one kv head, all blocks, to out.
using AttentionFn = void(const AttentionArgs &, int64_t kv_head, int64_t begin, int64_t end, float *work);
// All tokens of one kv head, a single block, to args.partial.
using AttentionBlockFn = void(const AttentionArgs &, int64_t kv_head, int64_t block, float *work);
// Folds the partial results of one row (t * heads + h) together, to out.
using AttentionMergeFn = void(const AttentionArgs &, int64_t row, float *work);

namespace LLAISYS_TIER {

static inline int64_t whole_vectors(int64_t n) { return (n + Vec::N - 1) / Vec::N * Vec::N; }
static inline int64_t group_of(const AttentionArgs &args) { return args.heads / args.kv_heads; }
// Keys that token t sees.
static inline int64_t visible(const AttentionArgs &args, int64_t t) { return args.keys - args.tokens + t + 1; }

// The result of a block, or the state of a row: m, l, and head_dim sums.
struct State {
    float *m, *l, *sums;
};
static inline State state_at(float *base, int64_t row, int64_t size) {
    float *p = base + row * size;
    return {p, p + 1, p + Vec::N};
}

AttentionPartialFn attention_partial;
int64_t attention_partial(const AttentionArgs &args) { return Vec::N + whole_vectors(args.head_dim); }

// How the scratch memory of a tile is laid out, each part in whole vectors.
struct Work {
    float *queries;   // [rows, padded(D)]
    float *scores;    // [rows, KEYS]
    float *values;    // [KEYS, D]
    float *key_panel; // [4, padded(D)]
    float *rotated;   // [D] of the storage dtype
    float *block;     // [rows] partial results
    float *state;     // [rows]
    float *end;
};
static inline Work layout(const AttentionArgs &args, int64_t rows, float *base) {
    const int64_t d = whole_vectors(args.head_dim), p = padded(args.head_dim);
    Work w;
    w.queries = base;
    w.scores = w.queries + rows * p;
    w.values = w.scores + rows * KEYS;
    w.key_panel = w.values + KEYS * d;
    w.rotated = w.key_panel + 4 * p;
    w.block = w.rotated + d;
    w.state = w.block + rows * (Vec::N + d);
    w.end = w.state + rows * (Vec::N + d);
    return w;
}

AttentionWorkFn attention_work;
int64_t attention_work(const AttentionArgs &args, int64_t tokens) {
    float *base = (float *)64;
    return layout(args, tokens * group_of(args), base).end - base;
}

// Row r of a tile is head kv_head * group + r % group of token begin + r / group.
template <class T>
static void load_queries(const AttentionArgs &args, const Work &w, int64_t kv_head, int64_t begin, int64_t rows) {
    const int64_t group = group_of(args), d = args.head_dim;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = begin + r / group, h = kv_head * group + r % group;
        const auto *q = (const T *)(args.q + t * args.q_token + h * args.q_head);
        if (args.table) {
            rope_row((T *)w.rotated, q, (const T *)args.table + t * d, d / 2);
            q = (const T *)w.rotated;
        }
        widen_row(w.queries + r * padded(d), q, d);
    }
}

// Scores of all rows against `count` keys, not scaled yet.
template <class T>
static void score_block(const AttentionArgs &args, const Work &w, const char *k, int64_t rows, int64_t count) {
    constexpr int NW = Vec::N == 16 ? 4 : 3;
    const int64_t d = args.head_dim, p = padded(d);
    int64_t j = 0;
    const auto keys = [&]<int N>() {
        const T *key[N];
        for (int i = 0; i < N; ++i) key[i] = (const T *)(k + (j + i) * args.k_token);
        if (rows <= 2 * TILE_M) {
            dot_rows<N, false>(w.scores + j, KEYS, w.queries, p, rows, key, d, true);
        } else {
            const float *panel[N];
            for (int i = 0; i < N; ++i) {
                widen_row(w.key_panel + i * p, key[i], d);
                panel[i] = w.key_panel + i * p;
            }
            dot_rows<N, true>(w.scores + j, KEYS, w.queries, p, rows, panel, p, true);
        }
        j += N;
    };
    while (j + NW <= count) keys.template operator()<NW>();
    while (j < count) keys.template operator()<1>();
}

// Turns the first n scores of a row into exponentials, the rest up to whole vectors into zeros. Scores that are all
// -infinity give m = -infinity and l = 0, which merge() passes over; a NaN goes into l and from there into the result.
static inline void softmax_row(float *scores, int64_t n, float scale, State s) {
    const float lowest = -__builtin_inff();
    const int64_t end = whole_vectors(n);
    for (int64_t j = n; j < end; ++j) scores[j] = lowest;
    Vec best = set1(lowest);
    const Vec factor = set1(scale);
    for (int64_t j = 0; j < end; j += Vec::N) {
        Vec v = load(scores + j) * factor;
        if (j + Vec::N > n) { // a negative or zero scale must not touch the mask
            store(scores + j, v);
            for (int64_t i = n; i < end; ++i) scores[i] = lowest;
            v = load(scores + j);
        }
        store(scores + j, v);
        best = max(best, v);
    }
    *s.m = hmax(best);
    const Vec m = set1(*s.m == lowest ? 0.0f : *s.m);
    Vec sum = zero();
    for (int64_t j = 0; j < end; j += Vec::N) {
        const Vec e = exp(load(scores + j) - m);
        store(scores + j, e);
        sum = sum + e;
    }
    *s.l = hsum(sum);
}

// sums (+)= sum over keys [begin, end) of weight * value, M rows and NV vectors of the head at a time, key after key.
template <int M, int NV>
static inline void weigh_tile(float *sums, int64_t size, const float *weights, const float *values, int64_t d,
                              int64_t begin, int64_t end) {
    Vec sum[M][NV];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) sum[m][n] = begin == 0 ? zero() : load(sums + m * size + n * Vec::N);
    for (int64_t j = begin; j < end; ++j) {
        Vec value[NV];
        for (int n = 0; n < NV; ++n) value[n] = load(values + j * d + n * Vec::N);
        for (int m = 0; m < M; ++m) {
            const Vec weight = set1(weights[m * KEYS + j]);
            for (int n = 0; n < NV; ++n) sum[m][n] = fma(weight, value[n], sum[m][n]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < NV; ++n) store(sums + m * size + n * Vec::N, sum[m][n]);
}

template <int M>
static inline void weigh(float *sums, int64_t size, const float *weights, const float *values, int64_t d, int64_t begin,
                         int64_t end) {
    int64_t c = 0;
    for (; c + 2 * Vec::N <= d; c += 2 * Vec::N) weigh_tile<M, 2>(sums + c, size, weights, values + c, d, begin, end);
    if (c < d) weigh_tile<M, 1>(sums + c, size, weights, values + c, d, begin, end);
}

// Partial results of the rows of a tile for one block, to w.block. Rows that see nothing of the block are left alone.
template <class T>
static void attend_block(const AttentionArgs &args, const Work &w, int64_t kv_head, int64_t begin, int64_t rows,
                         int64_t block) {
    const int64_t group = group_of(args), d = whole_vectors(args.head_dim), size = attention_partial(args);
    const int64_t first = block * KEYS, seen = visible(args, begin + (rows - 1) / group) - first;
    const int64_t count = seen < KEYS ? seen : KEYS;
    const auto limit = [&](int64_t r) {
        const int64_t n = visible(args, begin + r / group) - first;
        return n < count ? n : count;
    };
    score_block<T>(args, w, args.k + kv_head * args.k_head + first * args.k_token, rows, count);
    const char *v = args.v + kv_head * args.v_head + first * args.v_token;
    for (int64_t j = 0; j < count; ++j) {
        const auto *value = (const T *)(v + j * args.v_token);
        int64_t c = 0;
        for (; c + Vec::N <= args.head_dim; c += Vec::N) store(w.values + j * d + c, load(value + c));
        if (c < d) store(w.values + j * d + c, load(value + c, args.head_dim - c));
    }
    int64_t r = 0;
    while (r < rows && limit(r) <= 0) ++r;
    for (int64_t i = r; i < rows; ++i)
        softmax_row(w.scores + i * KEYS, limit(i), args.scale, state_at(w.block, i, size));
    // Each row stops at its own last key, also where it shares a tile: a weight of 0 would not keep a NaN or an
    // infinity of a key that lies in its future out.
    for (; r + 4 <= rows; r += 4) {
        const int64_t common = limit(r);
        weigh<4>(state_at(w.block, r, size).sums, size, w.scores + r * KEYS, w.values, d, 0, common);
        for (int64_t i = r + 1; i < r + 4; ++i)
            if (limit(i) > common)
                weigh<1>(state_at(w.block, i, size).sums, size, w.scores + i * KEYS, w.values, d, common, limit(i));
    }
    for (; r < rows; ++r)
        weigh<1>(state_at(w.block, r, size).sums, size, w.scores + r * KEYS, w.values, d, 0, limit(r));
}

static inline void clear(State s, int64_t d) {
    *s.m = -__builtin_inff();
    *s.l = 0.0f;
    for (int64_t c = 0; c < d; c += Vec::N) store(s.sums + c, zero());
}

// e^(m - best), where both may be -infinity.
static inline float factor(float m, float best) {
    float lanes[Vec::N];
    store(lanes, exp(set1(m - (best == -__builtin_inff() ? 0.0f : best))));
    return lanes[0];
}

static inline void merge(State s, State block, int64_t d) {
    const float best = *s.m > *block.m ? *s.m : *block.m;
    const float old = factor(*s.m, best), added = factor(*block.m, best);
    *s.l = *s.l * old + *block.l * added;
    *s.m = best;
    const Vec a = set1(old), b = set1(added);
    for (int64_t c = 0; c < d; c += Vec::N) store(s.sums + c, load(s.sums + c) * a + load(block.sums + c) * b);
}

template <class T>
static inline void finish(const AttentionArgs &args, int64_t t, int64_t h, State s) {
    auto *out = (T *)(args.out + t * args.out_token + h * args.out_head);
    const Vec l = set1(*s.l);
    int64_t c = 0;
    for (; c + Vec::N <= args.head_dim; c += Vec::N) store(out + c, load(s.sums + c) / l);
    if (c < args.head_dim) store(out + c, load(s.sums + c) / l, args.head_dim - c);
}

AttentionFn attention;
void attention(const AttentionArgs &args, int64_t kv_head, int64_t begin, int64_t end, float *work) {
    const int64_t group = group_of(args), rows = (end - begin) * group;
    const int64_t d = whole_vectors(args.head_dim), size = attention_partial(args);
    const Work w = layout(args, rows, work);
    with_type(args.dtype, [&]<class T>(T) {
        load_queries<T>(args, w, kv_head, begin, rows);
        for (int64_t r = 0; r < rows; ++r) clear(state_at(w.state, r, size), d);
        for (int64_t block = 0; block * KEYS < visible(args, end - 1); ++block) {
            attend_block<T>(args, w, kv_head, begin, rows, block);
            for (int64_t r = 0; r < rows; ++r)
                if (block * KEYS < visible(args, begin + r / group))
                    merge(state_at(w.state, r, size), state_at(w.block, r, size), d);
        }
        for (int64_t r = 0; r < rows; ++r)
            finish<T>(args, begin + r / group, kv_head * group + r % group, state_at(w.state, r, size));
    });
}

// Where the partial result of a block for row (t, h) lies: [block, token, head].
static inline State partial_at(const AttentionArgs &args, int64_t block, int64_t row) {
    return state_at(args.partial, block * args.tokens * args.heads + row, attention_partial(args));
}

AttentionBlockFn attention_block;
void attention_block(const AttentionArgs &args, int64_t kv_head, int64_t block, float *work) {
    const int64_t group = group_of(args), rows = args.tokens * group, size = attention_partial(args);
    const Work w = layout(args, rows, work);
    with_type(args.dtype, [&]<class T>(T) {
        load_queries<T>(args, w, kv_head, 0, rows);
        attend_block<T>(args, w, kv_head, 0, rows, block);
    });
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t t = r / group, h = kv_head * group + r % group;
        if (block * KEYS < visible(args, t))
            memcpy(partial_at(args, block, t * args.heads + h).m, w.block + r * size, size_t(size) * sizeof(float));
    }
}

AttentionMergeFn attention_merge;
void attention_merge(const AttentionArgs &args, int64_t row, float *work) {
    const int64_t d = whole_vectors(args.head_dim), t = row / args.heads;
    const State s = state_at(work, 0, attention_partial(args));
    clear(s, d);
    for (int64_t block = 0; block * KEYS < visible(args, t); ++block) merge(s, partial_at(args, block, row), d);
    with_type(args.dtype, [&]<class T>(T) { finish<T>(args, t, row % args.heads, s); });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL(attention, AttentionFn);
LLAISYS_KERNEL(attention_block, AttentionBlockFn);
LLAISYS_KERNEL(attention_merge, AttentionMergeFn);
LLAISYS_KERNEL(attention_work, AttentionWorkFn);
LLAISYS_KERNEL(attention_partial, AttentionPartialFn);

void check_attention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k, const LlaisysTensor *v,
                     float scale) {
    const Argument oq{"q", q}, ok{"k", k}, ov{"v", v}, oo{"out", out};
    check_floats({oq, ok, ov, oo});
    check_ndim(oq, 3);
    check_ndim(ok, 3);
    check_size(ok, 2, q->shape[2], "head dim of q");
    check_same_shape(ov, ok);
    check_same_shape(oo, oq);
    if (k->shape[1] == 0 ? q->shape[1] != 0 : q->shape[1] % k->shape[1] != 0)
        fail(LLAISYS_ERROR_SHAPE, "q: expected a multiple of the %lld heads of k, found %lld heads",
             (long long)k->shape[1], (long long)q->shape[1]);
    if (k->shape[0] < q->shape[0])
        fail(LLAISYS_ERROR_SHAPE, "k: expected at least as many keys as the %lld tokens of q, found %lld",
             (long long)q->shape[0], (long long)k->shape[0]);
    if (!(scale > -3.4e38f && scale < 3.4e38f))
        fail(LLAISYS_ERROR_INVALID_ARGUMENT, "scale: expected a finite number, found %g", double(scale));
    check_last_axis_contiguous({oo, oq, ok, ov});
    check_output(oo, {oq, ok, ov});
}

// Rows of a tile that share the widened keys and values.
constexpr int64_t ATTENTION_ROWS = 64;

static float *floats(Slot slot, int64_t count) {
    return static_cast<float *>(scratch(slot, size_t(count) * sizeof(float)));
}

void run_attention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k, const LlaisysTensor *v,
                   float scale, const void *table) {
    const int64_t size = dtype_size(q->dtype);
    AttentionArgs args{};
    args.out = static_cast<char *>(out->data);
    args.q = static_cast<const char *>(q->data);
    args.k = static_cast<const char *>(k->data);
    args.v = static_cast<const char *>(v->data);
    args.out_token = out->strides[0] * size, args.out_head = out->strides[1] * size;
    args.q_token = q->strides[0] * size, args.q_head = q->strides[1] * size;
    args.k_token = k->strides[0] * size, args.k_head = k->strides[1] * size;
    args.v_token = v->strides[0] * size, args.v_head = v->strides[1] * size;
    args.tokens = q->shape[0], args.keys = k->shape[0];
    args.heads = q->shape[1], args.kv_heads = k->shape[1], args.head_dim = q->shape[2];
    args.scale = scale;
    args.table = table;
    args.dtype = q->dtype;

    const int64_t tile = std::max<int64_t>(1, ATTENTION_ROWS / (args.heads / args.kv_heads));
    const int64_t blocks = (args.keys + KEYS - 1) / KEYS;
    const auto work_of = attention_work_kernel.get();
    if (args.tokens <= tile && args.kv_heads < 2 * num_threads() && blocks > 1) {
        const int64_t row_floats = attention_partial_kernel.get()(args);
        args.partial = floats(SLOT_PARTIAL, blocks * args.tokens * args.heads * row_floats);
        const auto block_kernel = attention_block_kernel.get();
        const auto merge_kernel = attention_merge_kernel.get();
        const int64_t work = work_of(args, args.tokens);
        parallel_for(args.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) block_kernel(args, i / blocks, i % blocks, floats(SLOT_WORK, work));
        });
        const int64_t rows = args.tokens * args.heads;
        parallel_for(rows, grain_for(rows, 16), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) merge_kernel(args, row, floats(SLOT_WORK, row_floats));
        });
        return;
    }
    const auto kernel = attention_kernel.get();
    const int64_t tiles = (args.tokens + tile - 1) / tile, work = work_of(args, std::min(tile, args.tokens));
    parallel_for(args.kv_heads * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            // The last tokens see the most keys: they come first, so that no thread is left with a long one at the end.
            const int64_t first = (tiles - 1 - i / args.kv_heads) * tile;
            kernel(args, i % args.kv_heads, first, std::min(first + tile, args.tokens), floats(SLOT_WORK, work));
        }
    });
}

} // namespace llaisys

int32_t llaisysSelfAttention(LlaisysTensor *out, const LlaisysTensor *q, const LlaisysTensor *k, const LlaisysTensor *v,
                             float scale) {
    using namespace llaisys;
    return guarded("self_attention", [&] {
        check_attention(out, q, k, v, scale);
        if (numel(*out) == 0) return;
        run_attention(out, q, k, v, scale, nullptr);
    });
}
#endif
