#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace llaisys {

const char *dtype_name(int32_t dtype) {
    static const char *const names[] = {"invalid", "byte", "bool", "i8",  "i16", "i32", "i64", "u8",  "u16",  "u32",
                                        "u64",     "f8",   "f16",  "f32", "f64", "c16", "c32", "c64", "c128", "bf16"};
    return dtype >= 0 && dtype < 20 ? names[dtype] : "unknown";
}

int64_t dtype_size(int32_t dtype) {
    static const int8_t sizes[] = {0, 1, 1, 1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 16, 2};
    return dtype >= 0 && dtype < 20 ? sizes[dtype] : 0;
}

std::string shape_text(const LlaisysTensor &t) {
    std::string text = "[";
    for (int32_t i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
    return text + "]";
}

int64_t numel(const LlaisysTensor &t) {
    int64_t n = 1;
    for (int32_t i = 0; i < t.ndim; ++i) n *= t.shape[i];
    return n;
}

void check_view(const Argument &argument) {
    const auto *name = argument.name;
    const auto *t = argument.tensor;
    if (!t) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "%s: expected a tensor, found NULL", name);
    if (t->ndim < 0 || t->ndim > LLAISYS_MAX_DIMS)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected 0 to %d axes, found %d", name, LLAISYS_MAX_DIMS, t->ndim);
    const int64_t size = dtype_size(t->dtype);
    if (size == 0) fail(LLAISYS_ERROR_DTYPE, "%s: %d is no element type", name, t->dtype);
    // The elements, and the bytes from the first to the last of them, are counted in int64 everywhere. That must hold
    // of axes that are never stepped along too, as there is arithmetic with their sizes and strides.
    int64_t count = size, reach = size;
    bool empty = false;
    for (int32_t i = 0; i < t->ndim; ++i) {
        if (t->shape[i] < 0)
            fail(LLAISYS_ERROR_SHAPE, "%s: axis %d has the negative size %lld", name, i, (long long)t->shape[i]);
        empty |= t->shape[i] == 0;
        const int64_t steps = std::max<int64_t>(t->shape[i], 1);
        int64_t span = 0;
        if (__builtin_mul_overflow(count, steps, &count) || t->strides[i] == INT64_MIN ||
            __builtin_mul_overflow(steps, std::abs(t->strides[i]), &span) ||
            __builtin_mul_overflow(span, size, &span) || __builtin_add_overflow(reach, span, &reach))
            fail(LLAISYS_ERROR_SHAPE, "%s: shape %s with its strides is larger than the address space", name,
                 shape_text(*t).c_str());
    }
    if (empty) return;
    if (!t->data) fail(LLAISYS_ERROR_INVALID_ARGUMENT, "%s: data is NULL", name);
}

int32_t check_floats(std::initializer_list<Argument> arguments) {
    const Argument *first = nullptr;
    for (const auto &a : arguments) {
        check_view(a);
        const int32_t dtype = a.tensor->dtype;
        if (dtype != LLAISYS_DTYPE_F32 && dtype != LLAISYS_DTYPE_F16 && dtype != LLAISYS_DTYPE_BF16)
            fail(LLAISYS_ERROR_DTYPE, "%s: expected f32, f16 or bf16, found %s", a.name, dtype_name(dtype));
        if (!first) first = &a;
        if (dtype != first->tensor->dtype)
            fail(LLAISYS_ERROR_DTYPE, "%s: expected %s as in %s, found %s", a.name, dtype_name(first->tensor->dtype),
                 first->name, dtype_name(dtype));
    }
    return first->tensor->dtype;
}

void check_dtype(const Argument &argument, int32_t dtype) {
    check_view(argument);
    if (argument.tensor->dtype != dtype)
        fail(LLAISYS_ERROR_DTYPE, "%s: expected %s, found %s", argument.name, dtype_name(dtype),
             dtype_name(argument.tensor->dtype));
}

void check_ndim(const Argument &argument, int32_t ndim) {
    if (argument.tensor->ndim != ndim)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected %d axes, found shape %s", argument.name, ndim,
             shape_text(*argument.tensor).c_str());
}

void check_size(const Argument &argument, int32_t axis, int64_t size, const char *what) {
    const auto &t = *argument.tensor;
    const int32_t i = axis < 0 ? t.ndim + axis : axis;
    if (i < 0 || i >= t.ndim || t.shape[i] != size)
        fail(LLAISYS_ERROR_SHAPE, "%s: expected %lld on axis %d (%s), found shape %s", argument.name, (long long)size,
             axis, what, shape_text(t).c_str());
}

void check_same_shape(const Argument &argument, const Argument &as) {
    const auto &t = *argument.tensor, &u = *as.tensor;
    if (t.ndim != u.ndim || !std::equal(t.shape, t.shape + t.ndim, u.shape))
        fail(LLAISYS_ERROR_SHAPE, "%s: expected shape %s as of %s, found %s", argument.name, shape_text(u).c_str(),
             as.name, shape_text(t).c_str());
}

void check_same_lead(const Argument &argument, const Argument &as) {
    const auto &t = *argument.tensor, &u = *as.tensor;
    if (t.ndim != u.ndim || t.ndim < 1 || !std::equal(t.shape, t.shape + t.ndim - 1, u.shape))
        fail(LLAISYS_ERROR_SHAPE, "%s: expected the leading axes of %s %s, found shape %s", argument.name, as.name,
             shape_text(u).c_str(), shape_text(t).c_str());
}

void check_last_axis_contiguous(std::initializer_list<Argument> arguments) {
    for (const auto &a : arguments) {
        const auto &t = *a.tensor;
        if (t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1)
            fail(LLAISYS_ERROR_STRIDE, "%s: expected a contiguous last axis (stride 1), found stride %lld", a.name,
                 (long long)t.strides[t.ndim - 1]);
    }
}

namespace {

// First byte and one past the last byte of the elements.
struct Extent {
    uintptr_t begin, end;
};

Extent extent(const LlaisysTensor &t) {
    const int64_t size = dtype_size(t.dtype);
    const auto base = reinterpret_cast<uintptr_t>(t.data);
    Extent e{base, base + uintptr_t(size)};
    for (int32_t i = 0; i < t.ndim; ++i) {
        const int64_t span = (t.shape[i] - 1) * t.strides[i] * size;
        (span < 0 ? e.begin : e.end) += uintptr_t(span);
    }
    return e;
}

bool contiguous(const LlaisysTensor &t) {
    int64_t stride = 1;
    for (int32_t i = t.ndim - 1; i >= 0; --i) {
        if (t.shape[i] != 1 && t.strides[i] != stride) return false;
        stride *= t.shape[i];
    }
    return true;
}

bool same_view(const LlaisysTensor &a, const LlaisysTensor &b) {
    if (a.data != b.data || a.dtype != b.dtype || a.ndim != b.ndim) return false;
    for (int32_t i = 0; i < a.ndim; ++i)
        if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
    return true;
}

// Two column ranges of one matrix (the q and k parts of a fused qkv, say) have overlapping extents but share no
// element: all leading strides of both are multiples of a common row, and within a row the byte ranges are disjoint.
bool interleaved(const LlaisysTensor &a, const LlaisysTensor &b) {
    int64_t row = 0, width_a = dtype_size(a.dtype), width_b = dtype_size(b.dtype);
    const auto outermost = [&row](const LlaisysTensor &t) {
        for (int32_t i = 0; i < t.ndim; ++i)
            if (t.shape[i] > 1) row = std::max<int64_t>(row, std::abs(t.strides[i]) * dtype_size(t.dtype));
    };
    outermost(a);
    outermost(b);
    if (row == 0) return false;
    const auto within = [row](const LlaisysTensor &t, int64_t &width) {
        for (int32_t i = 0; i < t.ndim; ++i) {
            if (t.shape[i] <= 1) continue;
            const int64_t step = t.strides[i] * dtype_size(t.dtype);
            if (step % row == 0) continue;
            if (step < 0) return false;
            width += (t.shape[i] - 1) * step;
        }
        return width <= row;
    };
    if (!within(a, width_a) || !within(b, width_b)) return false;
    const auto pa = reinterpret_cast<uintptr_t>(a.data), pb = reinterpret_cast<uintptr_t>(b.data);
    const int64_t offset = pb >= pa ? int64_t((pb - pa) % uintptr_t(row)) : row - int64_t((pa - pb) % uintptr_t(row));
    return offset >= width_a && offset + width_b <= row;
}

bool overlap(const LlaisysTensor &a, const LlaisysTensor &b) {
    if (numel(a) == 0 || numel(b) == 0) return false;
    const Extent x = extent(a), y = extent(b);
    return x.begin < y.end && y.begin < x.end && !interleaved(a, b);
}

// Whether two different indices can reach one element: with the axes ordered by stride, each must step over all that
// lies within it. Layouts that pass by a finer argument (strides 2 and 3, say) are refused: no user has made one yet.
bool overlaps_itself(const LlaisysTensor &t) {
    if (numel(t) == 0 || contiguous(t)) return false;
    struct Axis {
        int64_t stride, size;
    };
    std::vector<Axis> axes;
    for (int32_t i = 0; i < t.ndim; ++i)
        if (t.shape[i] > 1) axes.push_back({std::abs(t.strides[i]), t.shape[i]});
    std::sort(axes.begin(), axes.end(), [](const Axis &a, const Axis &b) { return a.stride < b.stride; });
    int64_t reach = 0;
    for (const Axis &axis : axes) {
        if (axis.stride <= reach) return true;
        reach += (axis.size - 1) * axis.stride;
    }
    return false;
}

} // namespace

void check_output(const Argument &output, std::initializer_list<Argument> inputs,
                  std::initializer_list<const char *> may_alias) {
    const auto &out = *output.tensor;
    if (overlaps_itself(out))
        fail(LLAISYS_ERROR_ALIAS, "%s: different elements of the output share memory", output.name);
    for (const auto &in : inputs) {
        if (!in.tensor || !overlap(out, *in.tensor)) continue;
        const bool allowed = std::any_of(may_alias.begin(), may_alias.end(),
                                         [&](const char *name) { return std::strcmp(name, in.name) == 0; });
        if (!allowed)
            fail(LLAISYS_ERROR_ALIAS, "%s: shares memory with %s, which is not allowed", output.name, in.name);
        if (!same_view(out, *in.tensor))
            fail(LLAISYS_ERROR_ALIAS, "%s: overlaps %s without being the same view", output.name, in.name);
    }
}

namespace {

// Drops axes of size 1 and merges neighbours that lie behind each other in every tensor. The axes that remain are
// written to `rows[t].size/step`, outermost first; returns how many.
int32_t merge_axes(const LlaisysTensor *const *tensors, size_t ntensors, int32_t naxes, Rows *rows) {
    int32_t kept = 0;
    for (int32_t i = 0; i < naxes; ++i) {
        const int64_t size = tensors[0]->shape[i];
        if (size == 1) continue;
        bool behind = kept > 0;
        for (size_t t = 0; t < ntensors && behind; ++t)
            behind = rows[t].step[kept - 1] == tensors[t]->strides[i] * dtype_size(tensors[t]->dtype) * size;
        if (!behind) ++kept;
        for (size_t t = 0; t < ntensors; ++t) {
            rows[t].size[kept - 1] = behind ? rows[t].size[kept - 1] * size : size;
            rows[t].step[kept - 1] = tensors[t]->strides[i] * dtype_size(tensors[t]->dtype);
        }
    }
    return kept;
}

} // namespace

Rows make_rows(const LlaisysTensor &t) {
    Rows rows{};
    rows.base = static_cast<char *>(t.data);
    rows.length = t.ndim > 0 ? t.shape[t.ndim - 1] : 1;
    rows.count = 1;
    for (int32_t i = 0; i + 1 < t.ndim; ++i) rows.count *= t.shape[i];
    const LlaisysTensor *one = &t;
    if (rows.count > 0) rows.naxes = merge_axes(&one, 1, std::max(t.ndim - 1, 0), &rows);
    return rows;
}

void make_joint_rows(std::initializer_list<const LlaisysTensor *> tensors, Rows *rows) {
    const auto n = tensors.size();
    const LlaisysTensor &first = **tensors.begin();
    const bool empty = numel(first) == 0;
    const int32_t naxes = empty ? 0 : merge_axes(tensors.begin(), n, first.ndim, rows);
    // The innermost axis that is left becomes the row, if it is contiguous in all of them.
    bool contiguous = naxes > 0;
    for (size_t t = 0; t < n && contiguous; ++t)
        contiguous = rows[t].step[naxes - 1] == dtype_size(tensors.begin()[t]->dtype);
    for (size_t t = 0; t < n; ++t) {
        Rows &r = rows[t];
        r.base = static_cast<char *>(tensors.begin()[t]->data);
        r.naxes = contiguous ? naxes - 1 : naxes;
        r.length = contiguous ? r.size[naxes - 1] : 1;
        r.count = empty ? 0 : 1;
        for (int32_t i = 0; i < r.naxes; ++i) r.count *= r.size[i];
        if (r.naxes == 0) r.step[0] = 0;
    }
}

} // namespace llaisys
