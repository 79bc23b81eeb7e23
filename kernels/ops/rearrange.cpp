// out[...] = x[...] between any two layouts.
#include "core/tier.h"

namespace llaisys {

// The axes of both tensors, merged where both allow; the last two are walked in tiles by the kernel, the others are
// counted out by the caller. Strides in bytes; missing axes have size 1.
struct RearrangeArgs {
    Rows out, x;
    int64_t item;                // bytes of an element
    int64_t rows, columns;       // of the tiled plane
    int64_t out_row, out_column; // strides
    int64_t x_row, x_column;
};
// Planes and, within the plane, rows [begin, end).
using RearrangeFn = void(const RearrangeArgs &, char *out, const char *x, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

template <class T>
static void copy_plane(const RearrangeArgs &args, char *out, const char *x, int64_t begin, int64_t end) {
    // Tiles of 16 x 16: the lines that a transposition reads across stay in the cache until they are used up. Larger
    // tiles run out of ways when the stride is a power of two.
    constexpr int64_t TILE = 16;
    for (int64_t i0 = begin; i0 < end; i0 += TILE) {
        const int64_t i1 = i0 + TILE < end ? i0 + TILE : end;
        for (int64_t j0 = 0; j0 < args.columns; j0 += TILE) {
            const int64_t j1 = j0 + TILE < args.columns ? j0 + TILE : args.columns;
            for (int64_t i = i0; i < i1; ++i) {
                for (int64_t j = j0; j < j1; ++j) {
                    T value; // by memcpy: the element need not be aligned
                    memcpy(&value, x + i * args.x_row + j * args.x_column, sizeof(T));
                    memcpy(out + i * args.out_row + j * args.out_column, &value, sizeof(T));
                }
            }
        }
    }
}

// n bytes. Rows of a head are a few lines, for which a call of memcpy takes up to a quarter longer; long rows it copies
// as well as can be.
static inline void copy_row(char *out, const char *x, int64_t n) {
    if (n < int64_t(sizeof(Vec)) || n >= 1024)
        memcpy(out, x, size_t(n));
    else
        copy_bytes(out, x, n, [](int64_t) {});
}

RearrangeFn rearrange;
void rearrange(const RearrangeArgs &args, char *out, const char *x, int64_t begin, int64_t end) {
    if (args.out_column == args.item && args.x_column == args.item) {
        for (int64_t i = begin; i < end; ++i)
            copy_row(out + i * args.out_row, x + i * args.x_row, args.columns * args.item);
        return;
    }
    struct Wide {
        uint64_t half[2];
    };
    switch (args.item) {
    case 1: return copy_plane<uint8_t>(args, out, x, begin, end);
    case 2: return copy_plane<uint16_t>(args, out, x, begin, end);
    case 4: return copy_plane<uint32_t>(args, out, x, begin, end);
    case 8: return copy_plane<uint64_t>(args, out, x, begin, end);
    default: return copy_plane<Wide>(args, out, x, begin, end);
    }
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>

namespace llaisys {

LLAISYS_KERNEL(rearrange, RearrangeFn);

static void check_rearrange(LlaisysTensor *out, const LlaisysTensor *x) {
    check_view({"x", x});
    check_view({"out", out});
    check_dtype({"out", out}, x->dtype);
    check_same_shape({"out", out}, {"x", x});
    check_output({"out", out}, {{"x", x}});
}

// Cuts the last `n` leading axes off `rows` (they become the plane).
static void drop_axes(Rows &rows, int32_t n) {
    for (int32_t i = 0; i < n; ++i) rows.count /= rows.size[--rows.naxes];
    if (rows.naxes == 0) rows.step[0] = 0;
}

} // namespace llaisys

int32_t llaisysRearrange(LlaisysTensor *out, const LlaisysTensor *x) {
    using namespace llaisys;
    return guarded("rearrange", [&] {
        check_rearrange(out, x);
        if (numel(*x) == 0) return;
        Rows rows[2] = {};
        make_joint_rows({out, x}, rows);
        const int64_t item = dtype_size(x->dtype);
        RearrangeArgs args{rows[0], rows[1], item, 1, args.out.length, 0, item, 0, item};
        int32_t plane = 0;
        // make_joint_rows has made the innermost axis the row if it is contiguous in both; otherwise it is still an
        // axis.
        if (args.out.length == 1 && args.out.naxes > 0) {
            const int32_t last = args.out.naxes - 1;
            args.columns = args.out.size[last];
            args.out_column = args.out.step[last];
            args.x_column = args.x.step[last];
            ++plane;
        }
        if (args.out.naxes > plane) {
            // Of the remaining axes the one along which out is densest: writes of whole lines matter most.
            const int32_t axis = args.out.naxes - 1 - plane;
            args.rows = args.out.size[axis];
            args.out_row = args.out.step[axis];
            args.x_row = args.x.step[axis];
            ++plane;
        }
        drop_axes(args.out, plane);
        drop_axes(args.x, plane);
        const int64_t count = args.out.count * args.rows;
        const int64_t least = std::max<int64_t>(16, 32768 / (args.columns * item));
        parallel_for(count, grain_for(count, least), [&, kernel = rearrange_kernel.get()](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end;) {
                const int64_t p = i / args.rows, row = i % args.rows, stop = std::min(row + end - i, args.rows);
                kernel(args, row_at(args.out, p), row_at(args.x, p), row, stop);
                i += stop - row;
            }
        });
    });
}
#endif
