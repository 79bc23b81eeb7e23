// What the C entries of element by element operators share.
#pragma once

#include "tensor.h"
#include "threads.h"

#include <algorithm>

namespace llaisys {

// Checks an operator of two inputs and an output of one shape and dtype; returns the dtype.
inline int32_t check_elementwise(const Argument &out, const Argument &a, const Argument &b,
                                 std::initializer_list<const char *> may_alias) {
    const int32_t dtype = check_floats({a, b, out});
    check_same_shape(b, a);
    check_same_shape(out, a);
    check_last_axis_contiguous({out, a, b});
    check_output(out, {a, b}, may_alias);
    return dtype;
}

// Calls `body(row, begin, end)` so that every element of every row is covered once, in parallel; long rows are cut into
// spans, short ones are taken several at a time. `least` is the number of elements below which a part of the work is
// not worth handing to another thread.
template <class Body>
void for_each_span(const Rows &rows, int64_t least, Body &&body) {
    constexpr int64_t SPAN = 4096;
    if (rows.length == 0) return;
    const int64_t spans = (rows.length + SPAN - 1) / SPAN, count = rows.count * spans;
    least = std::max<int64_t>(1, least / std::min(rows.length, SPAN));
    parallel_for(count, grain_for(count, least), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t begin = i % spans * SPAN;
            body(i / spans, begin, std::min(begin + SPAN, rows.length));
        }
    });
}

} // namespace llaisys
