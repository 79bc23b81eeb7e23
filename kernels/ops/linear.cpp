// out = r(x weight^T + bias), with weight [N, C] as it lies in the checkpoint.
//
// Rows of x are packed into panels once, for all threads. Few rows, or some, are multiplied by the weights on their way
// from memory; for many, blocks of the weights are packed too, into memory of the thread's own.
#include "linear_some.h"

#if defined(__AMX_BF16__)
#include "linear_amx.h"
#endif

namespace llaisys {

// What the panel, 0 if x is not packed, and the work of a thread take, and what the rows of x are cut into.
struct LinearPlan {
    int64_t panel_bytes, work_bytes;
    int64_t tile;  // rows of a tile of tile_row at most, 0 where matrix units take them
    int64_t tiles; // of rows
    int64_t unit;  // features that parts of the work are multiples of: whole tiles
    int64_t most;  // features of a part of the work
    int64_t parts; // of the work for each thread, below which the rows are cut too
};
using LinearPlanFn = LinearPlan(const LinearArgs &);
// Packs the tiles [begin, end) of x.
using LinearPackFn = void(const LinearArgs &, int64_t begin, int64_t end);
// The output features [begin, end), at most LINEAR_FEATURES, of the tiles [first, last).
using LinearFn = void(const LinearArgs &, int64_t first, int64_t last, int64_t begin, int64_t end, char *work);

namespace LLAISYS_TIER {

// A multiple of TILE_FEATURES in every tier, so that all share the work out alike.
constexpr int64_t VECTOR_UNIT = 12;

template <class T>
static void pack(const LinearArgs &args, int64_t begin, int64_t end) {
    const int64_t block = block_columns<T>(args.x.length);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile_row(args, tile), rows = tile_row(args, tile + 1) - first;
        for (int64_t m = 0; m < rows; ++m) {
            const T *row = (const T *)row_at(args.x, args.row + first + m);
            for (int64_t c = 0; c < args.x.length; c += block) {
                const int64_t columns = args.x.length - c < block ? args.x.length - c : block;
                pack_row(block_of<T>(args, c) + first * panel_bytes<T>(columns) + m * REG, rows, row + c, columns);
            }
        }
    }
}

// Packs the features [n, end), at most TILE_FEATURES, of the block of weights that starts with column c: what is
// missing is zero.
template <class T>
static void pack_weights(const LinearArgs &args, char *to, int64_t n, int64_t end, int64_t c, int64_t width) {
    for (int64_t j = 0; j < TILE_FEATURES; ++j, to += REG) {
        if (n + j < end)
            pack_row(to, TILE_FEATURES, weights<T>(args, n + j) + c, width);
        else
            for (int64_t at = 0; at < panel_bytes<T>(width); at += REG) memset(to + at * TILE_FEATURES, 0, REG);
    }
}

// Many rows: a tile of x stays in the first-level cache while all weights of the block pass. Beside the first products
// of a tile the next one is fetched; beside the last of all, row after row, what is packed next: the next block, or the
// first one of the features that follow.
template <class T>
static void many_rows(const LinearArgs &args, float *sums, char *packed, int64_t first, int64_t last, int64_t begin,
                      int64_t end) {
    const int64_t columns = args.x.length, block = block_columns<T>(columns);
    const int64_t tiles = (end - begin + TILE_FEATURES - 1) / TILE_FEATURES;
    for (int64_t c = 0; c < columns; c += block) {
        const int64_t width = columns - c < block ? columns - c : block, bytes = panel_bytes<T>(width);
        for (int64_t n = begin; n < end; n += TILE_FEATURES)
            pack_weights<T>(args, packed + (n - begin) * bytes, n, end, c, width);
        // The rows [coming, until) are fetched from column `from` on, one beside each of the last products.
        const bool more = c + block < columns;
        const int64_t from = more ? c + block : 0, there = more ? end : args.weight.count;
        int64_t coming = more ? begin : end;
        const int64_t until = there - coming < end - begin ? there : coming + (end - begin);
        int64_t others = (last - first) * tiles - (until - coming);
        for_tiles(args, first, last, [&]<int M>(int64_t, int64_t row) {
            const char *x = block_of<T>(args, c) + row * bytes;
            float *out = sums + (row - tile_row(args, first)) * LINEAR_FEATURES;
            panel_tiles<T, M>(out, LINEAR_FEATURES, x, packed, bytes, tiles, c == 0, [&](int64_t turn) {
                if (--others < 0 && coming < until) return (const char *)(weights<T>(args, coming++) + from);
                return x + (turn < M ? M + turn : 0) * bytes;
            });
        });
    }
}

template <class T>
static void finish_row(T *out, const float *sums, const T *bias, int64_t n) {
    int64_t i = 0;
    const auto value = [&](int64_t count) {
        const bool whole = count == Vec::N;
        const Vec sum = whole ? load(sums + i) : load(sums + i, count);
        return bias ? sum + (whole ? load(bias + i) : load(bias + i, count)) : sum;
    };
    for (; i + Vec::N <= n; i += Vec::N) store(out + i, value(Vec::N));
    if (i < n) store(out + i, value(n - i), n - i);
}

LinearPlanFn linear_plan;
LinearPlan linear_plan(const LinearArgs &args) {
    LinearPlan plan{};
    with_type(args.dtype, [&]<class T>(T) {
        const int64_t sums = args.rows * LINEAR_FEATURES * int64_t(sizeof(float));
#if defined(__AMX_BF16__)
        if constexpr (ON_TILES<T>) {
            plan = {tile_panel_bytes<T>(args.rows, args.x.length),
                    tile_work_bytes<T>(args.rows),
                    0,
                    tile_blocks(args.rows),
                    GROUP<T>,
                    TILE_FEATURES_AT_ONCE<T>,
                    1};
            return;
        }
#endif
        if (args.rows > 1 || !in_stream<T>(1, args.x.length)) // else stream_features reads x where it lies
            plan.panel_bytes = args.rows * panel_bytes<T>(args.x.length);
        const bool some = some_rows_pay<T>(args.rows, args.x.length);
        plan.tile = some ? SOME_TILE_ROWS : TILE_ROWS;
        plan.tiles = tiles_of(args.rows, plan.tile);
        plan.unit = VECTOR_UNIT;
        plan.most = LINEAR_FEATURES;
        plan.parts = 4;
        plan.work_bytes = sums;
        if (!some)
            plan.work_bytes +=
                plan.tiles <= FEW_TILES<T> ? args.rows * PART_FEATURES * REG : LINEAR_FEATURES * BLOCK_BYTES;
    });
    return plan;
}

LinearPackFn linear_pack;
void linear_pack(const LinearArgs &args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
#if defined(__AMX_BF16__)
        if constexpr (ON_TILES<T>) return pack_blocks<T>((bf16 *)args.panel, args.x, args.row, args.rows, begin, end);
#endif
        pack<T>(args, begin, end);
    });
}

LinearFn linear;
void linear(const LinearArgs &args, int64_t first, int64_t last, int64_t begin, int64_t end, char *work) {
    with_type(args.dtype, [&]<class T>(T) {
        const auto finish = [&](const float *sums, int64_t sums_row, int64_t row, int64_t rows, int64_t n,
                                int64_t features) {
            for (int64_t m = 0; m < rows; ++m)
                finish_row((T *)row_at(args.out, args.row + row + m) + n, sums + m * sums_row,
                           args.bias ? (const T *)args.bias + n : nullptr, features);
        };
#if defined(__AMX_BF16__)
        if constexpr (ON_TILES<T>) return tile_sums<T>(args, first, last, begin, end, work, finish);
#endif
        const int64_t row = tile_row(args, first), rows = tile_row(args, last) - row;
        auto *sums = (float *)work;
        char *packed = work + rows * LINEAR_FEATURES * int64_t(sizeof(float));
        if (args.x.length == 0)
            memset(sums, 0, size_t(packed - work));
        else if (SOME_ROWS<T> && args.tile == SOME_TILE_ROWS)
            some_rows<T>(args, sums, first, last, begin, end);
        else if (last - first <= FEW_TILES<T>)
            few_rows<T>(args, sums, (float *)packed, first, last, begin, end);
        else
            many_rows<T>(args, sums, packed, first, last, begin, end);
        finish(sums, LINEAR_FEATURES, row, rows, begin, end - begin);
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"
#include "linear.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL_BF16(linear, LinearFn);
LLAISYS_KERNEL_BF16(linear_pack, LinearPackFn);
LLAISYS_KERNEL_BF16(linear_plan, LinearPlanFn);

static void check_linear(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight,
                         const LlaisysTensor *bias) {
    check_floats({{"x", x}, {"weight", weight}, {"out", out}});
    if (x->ndim < 1) fail(LLAISYS_ERROR_SHAPE, "x: expected at least one axis, found shape []");
    check_ndim({"weight", weight}, 2);
    check_size({"weight", weight}, 1, x->shape[x->ndim - 1], "row length of x");
    check_same_lead({"out", out}, {"x", x});
    check_size({"out", out}, -1, weight->shape[0], "rows of weight");
    check_last_axis_contiguous({{"out", out}, {"x", x}, {"weight", weight}});
    if (bias) {
        check_floats({{"weight", weight}, {"bias", bias}});
        check_ndim({"bias", bias}, 1);
        check_size({"bias", bias}, 0, weight->shape[0], "rows of weight");
        check_last_axis_contiguous({{"bias", bias}});
    }
    check_output({"out", out}, {{"x", x}, {"weight", weight}, {"bias", bias}});
}

// How the work is shared out: parts of the features of all layers, in the plan's units, each no larger than the
// kernel's buffer; and cuts of the rows. With parts of 24 features, one for each thread at any rate, and no cuts, 512
// rows of 896 times 128 features took 182 us in bf16 and 346 in f32, against 149 and 268; parts of equal size won 5 to
// 10 % for all others.
struct LinearShare {
    int64_t units, parts, cuts;
    int64_t unit(int64_t part) const { return part * units / parts; }
};
static LinearShare share_linear(int64_t units, const LinearPlan &plan) {
    const int64_t most = plan.most / plan.unit;
    const int64_t threads = num_threads(), rows = (plan.tiles + 7) / 8; // in groups of 8 tiles
    LinearShare share{units, (units + most - 1) / most, 1};
    if (rows == 1) // Few rows: all threads get some of the features, two units at least.
        share.parts = std::max(share.parts, std::min(units / 2, threads * 4));
    else if (share.parts < plan.parts * threads) // As wide as can be, so that a tile of x is read for many features.
        share.cuts = std::min(threads, rows);
    if (share.cuts == 1 && share.parts > threads)
        share.parts = std::min((share.parts + threads - 1) / threads * threads, units);
    return share;
}

// The layers beside each other: a part is a range of units of the features of all.
struct LinearGroup {
    LinearArgs args[LINEAR_LAYERS];
    size_t count = 0;

    int64_t units(int64_t unit) const {
        int64_t sum = 0;
        for (size_t i = 0; i < count; ++i) sum += units_of(args[i], unit);
        return sum;
    }
    // Calls `call` with the features of each layer that lie in the units [begin, end).
    template <class Call>
    void for_features(int64_t begin, int64_t end, int64_t unit, Call call) const {
        for (size_t i = 0; i < count; ++i) {
            const int64_t units = units_of(args[i], unit);
            const int64_t first = std::max<int64_t>(begin, 0), last = std::min(end, units);
            if (first < last) call(args[i], first * unit, std::min(last * unit, args[i].weight.count));
            begin -= units;
            end -= units;
        }
    }
    static int64_t units_of(const LinearArgs &layer, int64_t unit) { return (layer.weight.count + unit - 1) / unit; }
};

static void run_linear(LinearGroup &group) {
    const Tier tier = active_tier();
    const auto kernel = linear_kernel.get(tier);
    const auto pack = linear_pack_kernel.get(tier);
    LinearArgs &args = group.args[0];
    const int64_t total = args.x.count, passes = (total + LINEAR_ROWS - 1) / LINEAR_ROWS;
    for (int64_t pass = 0; pass < passes; ++pass) {
        args.row = pass * total / passes;
        args.rows = (pass + 1) * total / passes - args.row;
        const LinearPlan plan = linear_plan_kernel.get(tier)(args);
        args.tile = plan.tile;
        args.panel = static_cast<char *>(scratch(SLOT_INPUT, size_t(plan.panel_bytes)));
        for (size_t i = 1; i < group.count; ++i) {
            group.args[i].row = args.row;
            group.args[i].rows = args.rows;
            group.args[i].tile = args.tile;
            group.args[i].panel = args.panel;
        }
        if (plan.panel_bytes > 0)
            parallel_for(plan.tiles, grain_for(plan.tiles, 4),
                         [&](int64_t begin, int64_t end) { pack(args, begin, end); });
        const LinearShare share = share_linear(group.units(plan.unit), plan);
        const int64_t cuts = share.cuts;
        parallel_for(share.parts * cuts, 1, [&](int64_t item, int64_t) {
            const int64_t cut = item / share.parts, part = item % share.parts;
            const int64_t first = cut * plan.tiles / cuts, last = (cut + 1) * plan.tiles / cuts;
            auto *work = static_cast<char *>(scratch(SLOT_WORK, size_t(plan.work_bytes)));
            group.for_features(share.unit(part), share.unit(part + 1), plan.unit,
                               [&](const LinearArgs &layer, int64_t begin, int64_t end) {
                                   kernel(layer, first, last, begin, end, work);
                               });
        });
    }
}

int32_t linear_layers(const LlaisysTensor *x, std::initializer_list<LinearLayer> layers) {
    return guarded("linear", [&] {
        LinearGroup group;
        for (const auto &[out, weight, bias] : layers) {
            check_linear(out, x, weight, bias);
            if (numel(*out) == 0) continue;
            group.args[group.count++] = {make_rows(*out),
                                         make_rows(*x),
                                         make_rows(*weight),
                                         bias ? static_cast<const char *>(bias->data) : nullptr,
                                         nullptr,
                                         0,
                                         0,
                                         0,
                                         x->dtype};
        }
        if (group.count > 0) run_linear(group);
    });
}

} // namespace llaisys

int32_t llaisysLinear(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight,
                      const LlaisysTensor *bias) {
    return llaisys::linear_layers(x, {{out, weight, bias}});
}
#endif
