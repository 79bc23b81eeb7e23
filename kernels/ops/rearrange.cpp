// out[...] = x[...] between any two layouts.
#include "core/tier.h"

namespace llaisys {

// Rows and columns of a tile.
[[maybe_unused]] constexpr int64_t EDGE = 16;

// The axes of both tensors, merged where both allow. Pieces that are contiguous in both are copied whole; two of the
// axes that are left are a plane of pieces, and the others are counted out by the caller. Strides in bytes; missing
// axes have size 1.
struct RearrangeArgs {
    Rows out, x;           // the planes
    int64_t item;          // bytes of a piece
    int64_t rows, columns; // of a plane
    int64_t out_row, out_column, x_row, x_column;
    int64_t tiles_across; // of a plane that is walked in tiles; 0 if it is walked row after row
};
// The tiles, or pieces, [begin, end) of a plane.
using RearrangeFn = void(const RearrangeArgs &, char *out, const char *x, int64_t begin, int64_t end);

namespace LLAISYS_TIER {

// A transposition of a whole tile by way of buffers: each line is read and written once. Straight from one tensor to
// the other, lines a power of two apart, of which there are more than ways, drive each other out of the cache before
// they are used up: 1024 x 1024 of f32 took 590 us and take 180, 1536 x 1000 of 16 bits 460 and 92.
template <class T>
static inline void transpose(char *out, int64_t out_row, const char *x, int64_t x_column) {
    constexpr int64_t N = EDGE;
    T in[N][N], turned[N][N];
    for (int64_t j = 0; j < N; ++j) memcpy(in[j], x + j * x_column, sizeof in[j]);
    for (int64_t i = 0; i < N; ++i)
        for (int64_t j = 0; j < N; ++j) turned[i][j] = in[j][i];
    for (int64_t i = 0; i < N; ++i) memcpy(out + i * out_row, turned[i], sizeof turned[i]);
}

// Calls `call` for each of the tiles [begin, end): where it lies in both tensors, its rows and its columns.
template <class Call>
LLAISYS_INLINE static inline void for_tiles(const RearrangeArgs &args, char *out, const char *x, int64_t begin,
                                            int64_t end, Call call) {
    constexpr int64_t N = EDGE;
    const int64_t across = args.tiles_across;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t i = tile / across * N, j = tile % across * N;
        call(out + i * args.out_row + j * args.out_column, x + i * args.x_row + j * args.x_column,
             args.rows - i < N ? args.rows - i : N, args.columns - j < N ? args.columns - j : N);
    }
}

template <class T>
static void copy_elements(const RearrangeArgs &args, char *out, const char *x, int64_t begin, int64_t end) {
    constexpr int64_t SIZE = sizeof(T), N = EDGE;
    const bool transposed = args.out_column == SIZE && args.x_row == SIZE;
    for_tiles(args, out, x, begin, end, [&](char *to, const char *from, int64_t rows, int64_t columns) {
        if (transposed && rows == N && columns == N) return transpose<T>(to, args.out_row, from, args.x_column);
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j) {
                T value; // by memcpy: the element need not be aligned
                memcpy(&value, from + i * args.x_row + j * args.x_column, SIZE);
                memcpy(to + i * args.out_row + j * args.out_column, &value, SIZE);
            }
    });
}

template <class Copy>
LLAISYS_INLINE static inline void copy_pieces(const RearrangeArgs &args, char *out, const char *x, int64_t begin,
                                              int64_t end, Copy copy) {
    if (args.tiles_across > 0)
        return for_tiles(args, out, x, begin, end, [&](char *to, const char *from, int64_t rows, int64_t columns) {
            for (int64_t j = 0; j < columns; ++j)
                for (int64_t i = 0; i < rows; ++i)
                    copy(to + i * args.out_row + j * args.out_column, from + i * args.x_row + j * args.x_column);
        });
    while (begin < end) {
        const int64_t i = begin / args.columns, next = (i + 1) * args.columns, stop = next < end ? next : end;
        char *to = out + i * args.out_row;
        const char *from = x + i * args.x_row;
        for (int64_t j = begin - i * args.columns; begin < stop; ++j, ++begin)
            copy(to + j * args.out_column, from + j * args.x_column);
    }
}

RearrangeFn rearrange;
void rearrange(const RearrangeArgs &args, char *out, const char *x, int64_t begin, int64_t end) {
    struct Wide {
        uint64_t half[2];
    };
    const int64_t n = args.item;
    switch (n) {
    case 1: return copy_elements<uint8_t>(args, out, x, begin, end);
    case 2: return copy_elements<uint16_t>(args, out, x, begin, end);
    case 4: return copy_elements<uint32_t>(args, out, x, begin, end);
    case 8: return copy_elements<uint64_t>(args, out, x, begin, end);
    case 16: return copy_elements<Wide>(args, out, x, begin, end);
    }
    // Rows of a head are a few lines, for which a call of memcpy takes up to a quarter longer; long rows it copies as
    // well as can be.
    if (n < int64_t(sizeof(Vec)) || n >= 1024)
        copy_pieces(args, out, x, begin, end, [n](char *to, const char *from) { memcpy(to, from, size_t(n)); });
    else
        copy_pieces(args, out, x, begin, end,
                    [n](char *to, const char *from) LLAISYS_INLINE { copy_bytes(to, from, n, [](int64_t) {}); });
}

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/tensor.h"
#include "core/threads.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace llaisys {

LLAISYS_KERNEL(rearrange, RearrangeFn);

static void check_rearrange(LlaisysTensor *out, const LlaisysTensor *x) {
    check_view({"x", x});
    check_view({"out", out});
    check_dtype({"out", out}, x->dtype);
    check_same_shape({"out", out}, {"x", x});
    check_output({"out", out}, {{"x", x}});
}

// Takes an axis from the planes: its size, and the stride of each.
static int64_t take_axis(RearrangeArgs &args, int32_t axis, int64_t &out_step, int64_t &x_step) {
    const int64_t size = args.out.size[axis];
    out_step = args.out.step[axis], x_step = args.x.step[axis];
    for (Rows *planes : {&args.out, &args.x}) {
        planes->count /= size;
        --planes->naxes;
        for (int32_t i = axis; i < planes->naxes; ++i) {
            planes->size[i] = planes->size[i + 1];
            planes->step[i] = planes->step[i + 1];
        }
        if (planes->naxes == 0) planes->step[0] = 0;
    }
    return size;
}

// A plane: the last axis, along which out is densest, and of the others the one along which x is.
static void take_plane(RearrangeArgs &args) {
    args.columns = take_axis(args, args.out.naxes - 1, args.out_column, args.x_column);
    args.rows = 1;
    if (args.x.naxes == 0) return;
    const int64_t *steps = args.x.step;
    int32_t densest = args.x.naxes - 1;
    for (int32_t i = densest; i-- > 0;)
        if (std::abs(steps[i]) < std::abs(steps[densest])) densest = i;
    args.rows = take_axis(args, densest, args.out_row, args.x_row);
}

// Single elements are walked in tiles. So are short pieces, down the columns, if that way is the shorter one in both
// tensors: lines a long way apart, often a power of two, meet in the same sets of the cache. 512 tokens of 14 heads of
// 64 in 16 bits, which lie head after head, took 13.9 us token after token and take 11. The other way round, row after
// row is better, and longer pieces are runs of their own.
static bool in_tiles(const RearrangeArgs &args) {
    const auto way = [](int64_t a, int64_t b) { return std::max(std::abs(a), std::abs(b)); };
    const bool element = args.item <= 16 && (args.item & (args.item - 1)) == 0;
    return element || (args.item < 2048 && way(args.out_row, args.x_row) < way(args.out_column, args.x_column));
}

} // namespace llaisys

int32_t llaisysRearrange(LlaisysTensor *out, const LlaisysTensor *x) {
    using namespace llaisys;
    return guarded("rearrange", [&] {
        check_rearrange(out, x);
        if (numel(*x) == 0) return;
        RearrangeArgs args{};
        Rows rows[2] = {};
        make_joint_rows({out, x}, rows);
        args.out = rows[0], args.x = rows[1];
        args.item = args.out.length * dtype_size(x->dtype);
        if (args.out.naxes == 0) // a single piece
            return parallel_for(args.item, grain_for(args.item, 32768), [&](int64_t begin, int64_t end) {
                std::memcpy(args.out.base + begin, args.x.base + begin, size_t(end - begin));
            });
        take_plane(args);
        const bool tiled = in_tiles(args);
        args.tiles_across = tiled ? (args.columns + EDGE - 1) / EDGE : 0;
        const int64_t parts = tiled ? (args.rows + EDGE - 1) / EDGE * args.tiles_across : args.rows * args.columns;
        const int64_t count = args.out.count * parts;
        const int64_t bytes = (args.rows * args.columns + parts - 1) / parts * args.item; // of a part
        parallel_for(count, grain_for(count, std::max<int64_t>(1, 32768 / bytes)),
                     [&, kernel = rearrange_kernel.get()](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end;) {
                             const int64_t p = i / parts, first = i % parts, last = std::min(first + end - i, parts);
                             kernel(args, row_at(args.out, p), row_at(args.x, p), first, last);
                             i += last - first;
                         }
                     });
    });
}
#endif
