// out = r(x weight^T + bias), with weight [N, C] as it lies in the checkpoint.
#include "linear.h"

#if defined(__AMX_BF16__)
#include "linear_amx.h"
#endif

namespace llaisys {

// Rows of x that are widened and multiplied together: 64 rows of a block of 1024 columns stay in the second-level
// cache.
constexpr int64_t LINEAR_ROWS = 64;
// Most output features of one part of the work; parts are multiples of 48, and so of all tiles' widths (3, 4, 16).
constexpr int64_t LINEAR_FEATURES = 96;

struct LinearArgs {
    Rows out, x, weight;
    const char *bias; // NULL or N elements
    void *panel;      // up to LINEAR_ROWS rows of x in the form that the kernel multiplies
    int32_t dtype;
};
// Bytes of a panel.
using LinearPanelFn = int64_t(const LinearArgs &, int64_t rows);
// Packs `rows` rows of x, from `row` on, into the panel; of its groups of 16 rows only [begin, end).
using LinearPackFn = void(const LinearArgs &, int64_t row, int64_t rows, int64_t begin, int64_t end);
// The output features [begin, end), at most LINEAR_FEATURES, of the `rows` rows of the panel, which start at `row`.
using LinearFn = void(const LinearArgs &, int64_t row, int64_t rows, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

constexpr int64_t GROUP = 16;

LinearPanelFn linear_panel;
int64_t linear_panel(const LinearArgs &args, int64_t rows) {
#if defined(__AMX_BF16__)
    if (args.dtype == LLAISYS_DTYPE_BF16) return tile_panel_bytes(rows, args.x.length);
#endif
    return rows * padded(args.x.length) * int64_t(sizeof(float));
}

LinearPackFn linear_pack;
void linear_pack(const LinearArgs &args, int64_t row, int64_t rows, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
    if (args.dtype == LLAISYS_DTYPE_BF16) {
        const int64_t block = panel_block(rows, args.x.length);
        for (int64_t g = begin; g < end; ++g) {
            const int64_t m = g * GROUP, count = rows - m < GROUP ? rows - m : GROUP;
            pack_block((bf16 *)args.panel + g * block, args.x, row + m, count, block_rows(rows));
        }
        return;
    }
#endif
    with_type(args.dtype, [&]<class T>(T) {
        const int64_t last = end * GROUP < rows ? end * GROUP : rows;
        for (int64_t m = begin * GROUP; m < last; ++m)
            widen_row((float *)args.panel + m * padded(args.x.length), (const T *)row_at(args.x, row + m),
                      args.x.length);
    });
}

// Few rows: the weights are widened on the way from memory, four rows of them at a time so that the additions of one
// wait for no other.
template <class T>
static void few_rows(const LinearArgs &args, float *sums, int64_t rows, int64_t begin, int64_t end) {
    const int64_t columns = args.x.length, panel_row = padded(columns);
    const auto *panel = (const float *)args.panel;
    int64_t n = begin;
    const auto block_of = [&](int64_t c) { return columns - c < BLOCK ? columns - c : BLOCK; };
    for (; n + 4 <= end; n += 4) {
        for (int64_t c = 0; c < columns; c += BLOCK) {
            const T *w[4];
            for (int j = 0; j < 4; ++j) w[j] = (const T *)row_at(args.weight, n + j) + c;
            dot_rows<4, false>(sums + (n - begin), LINEAR_FEATURES, panel + c, panel_row, rows, w, block_of(c), c == 0);
        }
    }
    for (; n < end; ++n) {
        for (int64_t c = 0; c < columns; c += BLOCK) {
            const T *w[1] = {(const T *)row_at(args.weight, n) + c};
            dot_rows<1, false>(sums + (n - begin), LINEAR_FEATURES, panel + c, panel_row, rows, w, block_of(c), c == 0);
        }
    }
}

// Many rows: a block of a few rows of the weights is widened once and used by all rows of the panel.
template <class T>
static void many_rows(const LinearArgs &args, float *sums, int64_t rows, int64_t begin, int64_t end) {
    constexpr int NW = Vec::N == 16 ? 4 : 3;
    const int64_t columns = args.x.length, panel_row = padded(columns);
    const auto *panel = (const float *)args.panel;
    alignas(64) float wide[NW][BLOCK];
    for (int64_t c = 0; c < columns; c += BLOCK) {
        const int64_t block = columns - c < BLOCK ? columns - c : BLOCK;
        int64_t n = begin;
        for (; n + NW <= end; n += NW) {
            const float *w[NW];
            for (int j = 0; j < NW; ++j) {
                widen_row(wide[j], (const T *)row_at(args.weight, n + j) + c, block);
                w[j] = wide[j];
            }
            dot_rows<NW, true>(sums + (n - begin), LINEAR_FEATURES, panel + c, panel_row, rows, w, padded(block),
                               c == 0);
        }
        for (; n < end; ++n) {
            widen_row(wide[0], (const T *)row_at(args.weight, n) + c, block);
            const float *w[1] = {wide[0]};
            dot_rows<1, true>(sums + (n - begin), LINEAR_FEATURES, panel + c, panel_row, rows, w, padded(block),
                              c == 0);
        }
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

LinearFn linear;
void linear(const LinearArgs &args, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    with_type(args.dtype, [&]<class T>(T) {
        alignas(64) float sums[LINEAR_ROWS * LINEAR_FEATURES];
        if (args.x.length == 0)
            memset(sums, 0, sizeof sums);
#if defined(__AMX_BF16__)
        else if (args.dtype == LLAISYS_DTYPE_BF16)
            tile_sums(sums, LINEAR_FEATURES, args.weight, (const bf16 *)args.panel, rows, begin, end);
#endif
        else if (rows <= 4)
            few_rows<T>(args, sums, rows, begin, end);
        else
            many_rows<T>(args, sums, rows, begin, end);
        for (int64_t m = 0; m < rows; ++m)
            finish_row((T *)row_at(args.out, row + m) + begin, sums + m * LINEAR_FEATURES,
                       args.bias ? (const T *)args.bias + begin : nullptr, end - begin);
    });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL_AMX(linear, LinearFn);
LLAISYS_KERNEL_AMX(linear_pack, LinearPackFn);
LLAISYS_KERNEL_AMX(linear_panel, LinearPanelFn);

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

// Features of one part: all threads get some, and a part is no larger than the kernel's buffer.
static int64_t linear_features(int64_t features) {
    const int64_t parts = int64_t(num_threads()) * 4;
    const int64_t wanted = (features + parts - 1) / parts;
    return std::clamp<int64_t>((wanted + 47) / 48 * 48, 48, LINEAR_FEATURES);
}

} // namespace llaisys

int32_t llaisysLinear(LlaisysTensor *out, const LlaisysTensor *x, const LlaisysTensor *weight,
                      const LlaisysTensor *bias) {
    using namespace llaisys;
    return guarded("linear", [&] {
        check_linear(out, x, weight, bias);
        if (numel(*out) == 0) return;
        LinearArgs args{
            make_rows(*out), make_rows(*x), make_rows(*weight), bias ? static_cast<const char *>(bias->data) : nullptr,
            nullptr,         x->dtype};
        const auto kernel = linear_kernel.get();
        const auto pack = linear_pack_kernel.get();
        const int64_t total = args.x.count;
        args.panel = scratch(SLOT_INPUT, size_t(linear_panel_kernel.get()(args, std::min(total, LINEAR_ROWS))));
        const int64_t features = weight->shape[0], part = linear_features(features);
        for (int64_t row = 0; row < total; row += LINEAR_ROWS) {
            const int64_t rows = std::min(total - row, LINEAR_ROWS);
            parallel_for((rows + 15) / 16, 1, [&](int64_t begin, int64_t end) { pack(args, row, rows, begin, end); });
            parallel_for(features, part, [&](int64_t begin, int64_t end) { kernel(args, row, rows, begin, end); });
        }
    });
}
#endif
