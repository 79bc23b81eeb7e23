// What a C entry checks of its tensor arguments, and the views that it hands to the kernels.
#pragma once

#include "rows.h"
#include "status.h"

#include <initializer_list>

namespace llaisys {

// One argument under its name, for the error text. `tensor` is NULL for an absent optional one.
struct Argument {
    const char *name;
    const LlaisysTensor *tensor;
};

const char *dtype_name(int32_t dtype);
// Bytes of an element; 0 for what is no element type.
int64_t dtype_size(int32_t dtype);
// "[2, 3]"
std::string shape_text(const LlaisysTensor &t);
int64_t numel(const LlaisysTensor &t);

// Every check that does not depend on the operator: not NULL, axes within bounds, no negative size, no overflow, data
// where there are elements, known dtype.
void check_view(const Argument &argument);
// check_view of all, and one dtype among F32, F16 and BF16 for all; returns it. Absent arguments are passed over.
int32_t check_floats(std::initializer_list<Argument> arguments);
void check_dtype(const Argument &argument, int32_t dtype);
void check_ndim(const Argument &argument, int32_t ndim);
// One axis (negative: from the end) has the size that `what` has, for example "length of x".
void check_size(const Argument &argument, int32_t axis, int64_t size, const char *what);
void check_same_shape(const Argument &argument, const Argument &as);
// Shapes agree but for the last axis.
void check_same_lead(const Argument &argument, const Argument &as);
void check_last_axis_contiguous(std::initializer_list<Argument> arguments);
// No two elements of an output share memory, and an output shares none with an input, unless it is the very same view
// and `may_alias` names that input.
void check_output(const Argument &output, std::initializer_list<Argument> inputs,
                  std::initializer_list<const char *> may_alias = {});

// The rows of the last axis of `t`; leading axes that lie behind each other are merged.
Rows make_rows(const LlaisysTensor &t);
// Rows of tensors of one shape, merged alike as far as all of them allow, the last axis too.
void make_joint_rows(std::initializer_list<const LlaisysTensor *> tensors, Rows *rows);

} // namespace llaisys
