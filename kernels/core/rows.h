// A tensor seen as rows of its last axis: what the row-wise operators walk over. Plain data and functions with internal
// linkage, as this header is compiled once per tier (see dtype.h).
#pragma once

#include <stdint.h>

namespace llaisys {

struct Rows {
    char *base;
    int64_t count;   // rows
    int64_t length;  // elements of a row, contiguous
    int32_t naxes;   // of the leading axes, after merging those that can be
    int64_t size[8]; // of each leading axis
    int64_t step[8]; // in bytes
};

[[maybe_unused]] static inline char *row_at(const Rows &rows, int64_t i) {
    if (rows.naxes <= 1) return rows.base + i * rows.step[0];
    char *p = rows.base;
    for (int32_t axis = rows.naxes - 1; axis >= 0; --axis) {
        p += i % rows.size[axis] * rows.step[axis];
        i /= rows.size[axis];
    }
    return p;
}

} // namespace llaisys
