// Causal attention with grouped query heads, out = softmax(scale q k^T + mask) v.
//
// The keys are walked in blocks of KEYS, counted from position 0. A block gives each row (a query token and head) its
// maximum m, its sum of exponentials l and its weighted sums of values; merging folds the blocks into the row's state
// in ascending order. That fixes the order of every sum, whatever rows are computed together and whether the blocks of
// a row are walked by one thread or computed apart by several (which a single token over a long cache needs).
#include "self_attention.h"
#include "attention_tile.h"
#include "rope.h"

#if defined(__AVX512BF16__)
#include "attention_bf16.h"
#if defined(__AMX_BF16__)
#include "attention_f16.h"
#endif
#elif defined(__AMX_BF16__)
#error "the amx tier is compiled with -mavx512bf16: else attention would quietly do without tiles"
#endif

namespace llaisys {

constexpr int64_t KEYS = 128;

// Floats of scratch memory for `tokens` tokens of one kv head, with room for the queries of `heads` of them, and of one
// kv head's partial results for a block.
using AttentionWorkFn = int64_t(const AttentionArgs &, int64_t tokens, int64_t heads);
using AttentionPartialFn = int64_t(const AttentionArgs &);
// Tokens [begin, end) of one kv head, all blocks, to out.
using AttentionFn = void(const AttentionArgs &, int64_t kv_head, int64_t begin, int64_t end, float *work);
// All tokens and kv heads, the blocks [begin, end) each for itself, to args.partial. `first` and `last`: of those that
// the thread works on.
using AttentionBlocksFn = void(const AttentionArgs &, int64_t begin, int64_t end, bool first, bool last, float *work);
// Folds the partial results of one kv head together, to out.
using AttentionMergeFn = void(const AttentionArgs &, int64_t kv_head, float *work);

namespace LLAISYS_TIER {

static inline int64_t group_of(const AttentionArgs &args) { return args.heads / args.kv_heads; }
// Keys that token t sees.
static inline int64_t visible(const AttentionArgs &args, int64_t t) { return args.keys - args.tokens + t + 1; }

// The rows of a tile: row r is head kv_head * group + r % group of token begin + r / group.
struct Tile {
    int64_t kv_head, begin, rows;
};

// The results of a block, or the states of the rows: m, l, and head_dim sums of each row.
struct State {
    float *m, *l, *sums;
};
static inline State state_at(float *base, int64_t rows) {
    const int64_t padded = whole_vectors(rows);
    return {base, base + padded, base + 2 * padded};
}
static inline int64_t state_floats(const AttentionArgs &args, int64_t rows) {
    return 2 * whole_vectors(rows) + rows * whole_vectors(args.head_dim);
}

AttentionPartialFn attention_partial;
int64_t attention_partial(const AttentionArgs &args) { return state_floats(args, args.tokens * group_of(args)); }

// How the scratch memory of a tile is laid out. There is room for 15 rows more, as tiles of 16 start at any row.
struct Work {
    float *queries; // [rows, depth of D] of the dtype's Factor, for each kv head
    float *scores;  // [rows, KEYS]
    float *weights; // [rows, KEYS, PARTS] of the dtype's Factor; the scores themselves where that is f32
    float *panel;   // [D, PANEL] of keys or [KEYS, PANEL] of values
    float *rotated; // [D] of the storage dtype
    float *block;   // m, l [rows] of a block
    float *factors; // [2, rows]
    float *state;
    float *end;
    int64_t head_queries; // floats
};
static inline Work layout(const AttentionArgs &args, int64_t rows, int64_t heads, float *base) {
    const int64_t d = (args.head_dim + PAIR - 1) / PAIR * PAIR, padded = (rows + 30) / 16 * 16;
    Work w;
    w.head_queries = padded * d;
    w.queries = base;
    w.scores = w.queries + heads * w.head_queries;
    w.weights = w.scores + padded * KEYS;
    w.panel = w.weights + padded * KEYS;
    w.rotated = w.panel + (d > KEYS ? d : KEYS) * PANEL;
    w.block = w.rotated + d;
    w.factors = w.block + 2 * whole_vectors(rows);
    w.state = w.factors + 2 * whole_vectors(rows);
    w.end = w.state + state_floats(args, rows);
    return w;
}

AttentionWorkFn attention_work;
int64_t attention_work(const AttentionArgs &args, int64_t tokens, int64_t heads) {
    float *base = (float *)64;
    return layout(args, tokens * group_of(args), heads, base).end - base;
}

template <class T>
static void load_queries(const AttentionArgs &args, const Work &w, const Tile &tile) {
    using Factor = typename AttentionMath<T>::Factor;
    const int64_t group = group_of(args), d = args.head_dim;
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t t = tile.begin + r / group, h = tile.kv_head * group + r % group;
        const auto *q = (const T *)(args.q + t * args.q_token + h * args.q_head);
        if (args.table) {
            rope_row((T *)w.rotated, q, (const T *)args.table + t * d, d / 2);
            q = (const T *)w.rotated;
        }
        AttentionMath<T>::query((Factor *)w.queries + r * AttentionMath<T>::depth(d), q, d);
    }
}

// Turns the first n scores of a row into weights, their exponentials. Scores that are all -infinity give m = -infinity
// and l = 0, which merging passes over; a NaN goes into l and from there into the result.
template <class T>
static inline void softmax_row(typename AttentionMath<T>::Factor *weights, const float *scores, int64_t n, Vec scale,
                               float *m, float *l) {
    const float lowest = -__builtin_inff();
    const int64_t whole = n / Vec::N * Vec::N;
    Vec best = set1(lowest), tail = set1(lowest);
    for (int64_t j = 0; j < whole; j += Vec::N) best = max(best, load(scores + j) * scale);
    if (whole < n) { // what lies behind is neither read nor, scaled, a score: the scale may be 0 or negative
        float part[Vec::N];
        store(part, load(scores + whole, n - whole) * scale);
        for (int64_t i = n - whole; i < Vec::N; ++i) part[i] = lowest;
        tail = load(part);
        best = max(best, tail);
    }
    *m = hmax(best);
    const Vec shift = set1(*m == lowest ? 0.0f : *m);
    Vec sum = zero();
    for (int64_t j = 0; j < whole; j += Vec::N) {
        const Vec e = exp(load(scores + j) * scale - shift);
        AttentionMath<T>::weight(weights, j, e);
        sum = sum + e;
    }
    if (whole < n) {
        const Vec e = exp(tail - shift);
        AttentionMath<T>::weight(weights, whole, e); // zeros behind n
        sum = sum + e;
    }
    *l = hsum(sum);
}

// Folds m and l of a block into those of the state, and gives what the sums of each are to be multiplied with: e to the
// power of the old maxima less the new one, where both may be -infinity.
static inline void merge_maxima(State s, const float *m, const float *l, float *old, float *added, int64_t rows) {
    for (int64_t r = 0; r < rows; r += Vec::N) {
        const Vec a = load(s.m + r), b = load(m + r), best = max(a, b);
        float part[Vec::N];
        store(part, best);
        for (int i = 0; i < Vec::N; ++i) part[i] = part[i] == -__builtin_inff() ? 0.0f : part[i];
        const Vec shift = load(part), x = exp(a - shift), y = exp(b - shift);
        store(old + r, x);
        store(added + r, y);
        store(s.l + r, load(s.l + r) * x + load(l + r) * y);
        store(s.m + r, best);
    }
}
static inline void merge_sums(float *sums, const float *block, float old, float added, int64_t n) {
    const Vec a = set1(old), b = set1(added);
    for (int64_t c = 0; c < n; c += Vec::N) store(sums + c, load(sums + c) * a + load(block + c) * b);
}

static inline void clear(State s, int64_t rows, int64_t d) {
    for (int64_t r = 0; r < rows; r += Vec::N) {
        store(s.m + r, set1(-__builtin_inff()));
        store(s.l + r, zero());
    }
    for (int64_t c = 0; c < rows * d; c += Vec::N) store(s.sums + c, zero());
}

// A block of keys as the rows of a tile see it: row r sees the first limit(r) keys of it, at most count.
struct Block {
    const char *k, *v;
    int64_t first, count;
};
static inline int64_t limit(const AttentionArgs &args, const Tile &tile, const Block &block, int64_t r) {
    const int64_t n = visible(args, tile.begin + r / group_of(args)) - block.first;
    return n < block.count ? n : block.count;
}

// Scores of the rows against the keys of a block, not scaled yet; of rows that see a key of a panel only.
template <class T>
static void score_block(const AttentionArgs &args, const Work &w, const Tile &tile, const Block &block, Ahead &ahead) {
    using Math = AttentionMath<T>;
    const int64_t d = args.head_dim;
    for (int64_t j = 0, r = 0; j < block.count; j += PANEL) {
        const int64_t count = block.count - j < PANEL ? block.count - j : PANEL;
        Math::keys(w.panel, block.k + j * args.k_token, args.k_token, count, d, ahead.share(count, block.count));
        while (limit(args, tile, block, r) <= j) ++r;
        for (int64_t i = r, n; i < tile.rows; i += n) {
            n = Math::rows(tile.rows - i);
            const int64_t seen = limit(args, tile, block, i + n - 1) - j; // by the last of them
            Math::score(w.scores + i * KEYS + j, KEYS, (const typename Math::Factor *)w.queries + i * Math::depth(d), n,
                        w.panel, whole_vectors(seen < count ? seen : count) / Vec::N, d);
        }
    }
}

// The block for all rows. `merged`: into the state of the tile; otherwise, as it is, into `to`.
template <class T, bool merged>
static void attend_block(const AttentionArgs &args, const Work &w, const Tile &tile, int64_t number, State to,
                         Ahead &ahead) {
    using Math = AttentionMath<T>;
    const int64_t d = args.head_dim, wide = whole_vectors(d), rows = tile.rows;
    Block block;
    block.first = number * KEYS;
    const int64_t seen = visible(args, tile.begin + (rows - 1) / group_of(args)) - block.first;
    block.count = seen < KEYS ? seen : KEYS;
    block.k = args.k + tile.kv_head * args.k_head + block.first * args.k_token;
    block.v = args.v + tile.kv_head * args.v_head + block.first * args.v_token;
    score_block<T>(args, w, tile, block, ahead);

    auto *weights =
        sizeof(typename Math::Factor) == 4 ? (typename Math::Factor *)w.scores : (typename Math::Factor *)w.weights;
    constexpr int64_t weights_row = KEYS * Math::PARTS;
    float *m = merged ? w.block : to.m, *l = merged ? w.block + whole_vectors(rows) : to.l;
    int64_t start = 0; // rows before see nothing of the block
    for (; limit(args, tile, block, start) <= 0; ++start) m[start] = -__builtin_inff(), l[start] = 0.0f;
    for (int64_t r = start; r < rows; ++r)
        softmax_row<T>(weights + r * weights_row, w.scores + r * KEYS, limit(args, tile, block, r), set1(args.scale),
                       m + r, l + r);
    for (int64_t r = rows; r % Vec::N != 0; ++r) m[r] = -__builtin_inff(), l[r] = 0.0f;
    float *old = w.factors, *added = w.factors + whole_vectors(rows);
    if constexpr (merged) merge_maxima(to, m, l, old, added, rows);

    const bool direct = Math::direct(rows, d);
    for (int64_t c = 0; c < d; c += PANEL) {
        const int64_t end = c + PANEL < d ? c + PANEL : d, vectors = whole_vectors(end - c) / Vec::N;
        if (!direct) Math::values(w.panel, block.v, args.v_token, block.count, c, end, ahead.share(end - c, d));
        for (int64_t r = start, n; r < rows; r += n) {
            n = Math::rows(rows - r);
            alignas(64) float part[16 * PANEL];
            float *out = merged ? part : to.sums + r * wide + c;
            const int64_t out_row = merged ? PANEL : wide;
            const auto own = [&](int64_t i) { return limit(args, tile, block, r + i); };
            if (direct)
                Math::weigh_direct(out, out_row, weights + r * weights_row, weights_row, n,
                                   block.v + c * int64_t(sizeof(T)), args.v_token, vectors, own);
            else
                Math::weigh(out, out_row, weights + r * weights_row, weights_row, n, w.panel, vectors, own);
            if constexpr (merged)
                for (int64_t i = 0; i < n; ++i)
                    merge_sums(to.sums + (r + i) * wide + c, part + i * PANEL, old[r + i], added[r + i],
                               vectors * Vec::N);
        }
    }
}

template <class T>
static void finish(const AttentionArgs &args, const Tile &tile, State s) {
    const int64_t group = group_of(args), d = args.head_dim, wide = whole_vectors(d);
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t t = tile.begin + r / group, h = tile.kv_head * group + r % group;
        auto *out = (T *)(args.out + t * args.out_token + h * args.out_head);
        const float *sums = s.sums + r * wide;
        const Vec l = set1(s.l[r]);
        int64_t c = 0;
        for (; c + Vec::N <= d; c += Vec::N) store(out + c, load(sums + c) / l);
        if (c < d) store(out + c, load(sums + c) / l, d - c);
    }
}

AttentionFn attention;
void attention(const AttentionArgs &args, int64_t kv_head, int64_t begin, int64_t end, float *work) {
    const Tile tile{kv_head, begin, (end - begin) * group_of(args)};
    const Work w = layout(args, tile.rows, 1, work);
    const State state = state_at(w.state, tile.rows);
    Ahead nothing; // the keys of one head alone are not in one stream, and many rows do not wait
    with_type(args.dtype, [&]<class T>(T) {
        AttentionMath<T>::begin();
        load_queries<T>(args, w, tile);
        clear(state, tile.rows, whole_vectors(args.head_dim));
        for (int64_t block = 0; block * KEYS < visible(args, end - 1); ++block)
            attend_block<T, true>(args, w, tile, block, state, nothing);
        AttentionMath<T>::end();
        finish<T>(args, tile, state);
    });
}

// Where the partial results of a block lie: [kv head, block].
static inline State partial_at(const AttentionArgs &args, int64_t kv_head, int64_t block) {
    const int64_t blocks = (args.keys + KEYS - 1) / KEYS;
    return state_at(args.partial + (kv_head * blocks + block) * attention_partial(args), args.tokens * group_of(args));
}

AttentionBlocksFn attention_blocks;
void attention_blocks(const AttentionArgs &args, int64_t begin, int64_t end, bool first, bool last, float *work) {
    const int64_t rows = args.tokens * group_of(args), heads = args.kv_heads;
    const Work all = layout(args, rows, heads, work);
    const auto of_head = [&](int64_t head) {
        Work w = all;
        w.queries += head * w.head_queries;
        return w;
    };
    with_type(args.dtype, [&]<class T>(T) {
        using Math = AttentionMath<T>;
        Ahead ahead;
        // Only heads that lie beside each other: where each lies for itself, the processor sees its rows as a stream.
        const auto add = [&](const char *base, int64_t token, int64_t head, int64_t block) {
            const int64_t at = block * KEYS, left = args.keys - at, own = args.head_dim * int64_t(sizeof(T));
            if (heads == 1 || head == own) ahead.add(base + at * token, token, heads * own, left < KEYS ? left : KEYS);
        };
        const auto add_keys = [&](int64_t block) { add(args.k, args.k_token, args.k_head, block); };
        const auto add_values = [&](int64_t block) { add(args.v, args.v_token, args.v_head, block); };
        if (first) {
            add_keys(begin);
            ahead.ask(ahead.lines());
            add_values(begin);
        }
        Math::begin();
        for (int64_t head = 0; head < heads; ++head) load_queries<T>(args, of_head(head), {head, 0, rows});
        for (int64_t block = begin; block < end; ++block) {
            if (block + 1 < end || !last) {
                add_keys(block + 1);
                add_values(block + 1);
            }
            ahead.plan(heads * (Math::direct(rows, args.head_dim) ? 1 : 2));
            for (int64_t head = 0; head < heads; ++head)
                attend_block<T, false>(args, of_head(head), {head, 0, rows}, block, partial_at(args, head, block),
                                       ahead);
        }
        Math::end();
    });
}

AttentionMergeFn attention_merge;
void attention_merge(const AttentionArgs &args, int64_t kv_head, float *work) {
    const Tile tile{kv_head, 0, args.tokens * group_of(args)};
    const int64_t wide = whole_vectors(args.head_dim), rows = tile.rows;
    const Work w = layout(args, rows, 1, work);
    const State state = state_at(w.state, rows);
    float *old = w.factors, *added = w.factors + whole_vectors(rows);
    clear(state, rows, wide);
    for (int64_t block = 0; block * KEYS < args.keys; ++block) {
        const State part = partial_at(args, kv_head, block);
        merge_maxima(state, part.m, part.l, old, added, rows);
        for (int64_t r = 0; r < rows; ++r)
            if (block * KEYS < visible(args, r / group_of(args)))
                merge_sums(state.sums + r * wide, part.sums + r * wide, old[r], added[r], wide);
    }
    with_type(args.dtype, [&]<class T>(T) { finish<T>(args, tile, state); });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL_BF16(attention, AttentionFn);
LLAISYS_KERNEL_BF16(attention_blocks, AttentionBlocksFn);
LLAISYS_KERNEL_BF16(attention_merge, AttentionMergeFn);
LLAISYS_KERNEL_BF16(attention_work, AttentionWorkFn);
LLAISYS_KERNEL_BF16(attention_partial, AttentionPartialFn);

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

// Rows of a tile that share the panels of keys and values: enough to make up for filling them, few enough for the
// second-level cache (350 KiB at a head dim of 128).
constexpr int64_t ATTENTION_ROWS = 192;
// Rows up to which blocks of keys are computed apart where there are too few heads for all threads.
constexpr int64_t SPLIT_ROWS = 64;
// Floating point operations of a call that one thread has done by the time that another has got its part, and up to
// which a cache is too short to be cut into blocks.
constexpr int64_t ATTENTION_SMALL = 1 << 17, ATTENTION_SHORT = 1 << 19;

// Tokens of a tile. Where threads would go without, tiles are smaller.
static int64_t tile_tokens(const AttentionArgs &args) {
    const int64_t group = args.heads / args.kv_heads;
    int64_t tokens = std::clamp<int64_t>(ATTENTION_ROWS / group, 1, args.tokens);
    while (tokens * group > SPLIT_ROWS && args.kv_heads * ((args.tokens + tokens - 1) / tokens) < 4 * num_threads())
        tokens = (tokens + 1) / 2;
    while (tokens > 6 && tokens < args.tokens && tokens * group % 6 != 0) --tokens; // whole register tiles
    return tokens;
}

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

    const Tier tier = active_tier();
    const int64_t tile = tile_tokens(args), tiles = (args.tokens + tile - 1) / tile;
    const int64_t blocks = (args.keys + KEYS - 1) / KEYS, group = args.heads / args.kv_heads;
    const int64_t operations = 4 * args.tokens * args.keys * args.heads * args.head_dim;
    if (operations >= ATTENTION_SHORT && args.tokens * group <= SPLIT_ROWS && blocks > 1) {
        args.partial = floats(SLOT_PARTIAL, args.kv_heads * blocks * attention_partial_kernel.get(tier)(args));
        const auto blocks_kernel = attention_blocks_kernel.get(tier);
        const auto merge_kernel = attention_merge_kernel.get(tier);
        const int64_t work = attention_work_kernel.get(tier)(args, args.tokens, args.kv_heads);
        const int64_t run = std::clamp<int64_t>(blocks / (2 * num_threads()), 1, 64), parts = (blocks + run - 1) / run;
        parallel_for(parts, 1, [&](int64_t part, int64_t) {
            blocks_kernel(args, part * run, std::min(part * run + run, blocks), starts_share(part, parts),
                          starts_share(part + 1, parts), floats(SLOT_WORK, work));
        });
        // A merge takes less time than to wake a thread, but for very long caches.
        parallel_for(args.kv_heads, blocks < 64 ? args.kv_heads : 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge_kernel(args, i, floats(SLOT_WORK, work));
        });
        return;
    }
    const auto kernel = attention_kernel.get(tier);
    const int64_t count = args.kv_heads * tiles, work = attention_work_kernel.get(tier)(args, tile, 1);
    parallel_for(count, operations < ATTENTION_SMALL ? count : 1, [&](int64_t begin, int64_t end) {
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
