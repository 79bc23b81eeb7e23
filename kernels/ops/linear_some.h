// Some rows of x: more than few, and too few to pay for packing the weights.
#pragma once

#include "linear_few.h"

namespace llaisys::LLAISYS_TIER {

// Rows of x and of the weights in a tile. The weights stay in the first-level cache where they were read, unpacked,
// while x passes from the second-level one, so that more of the weights than of x had better be in a tile.
constexpr int64_t SOME_TILE_ROWS = 4;
constexpr int SOME_FEATURES = 6;

// Whether there are some rows. 8960 features of 1536 columns of bf16 took, in us, few_rows or many_rows and this: 12
// rows 613 and 530 (reading the weights is 540), 16 rows 646 and 570, 24 rows 920 and 701, 32 rows 1247 and 907, 64
// rows 2070 and 1790, 128 rows 3800 and 3570, 192 rows 5920 and 5350; 256 rows 7220 and 7360. Of more than one block it
// reads short parts of the weights' rows, and loses against few_rows: 16 rows of 8960 columns 647 and 680 (24 rows 1050
// and 720). So it does with few columns, where adding up the lanes counts most and many_rows has that beside its
// products: 32 rows times 1152 features of 224 columns 26 and 31, times 224 features of 576 columns 15 and 17. It takes
// all registers there are, so that nothing can be widened on the way; f32 gained 7 % with 24 rows and lost 10 % with
// 64.
//
// MOST_BYTES of x, of a block, leave room in a second-level cache of 1 MiB.
template <class T>
constexpr bool SOME_ROWS = Product<T>::REGS == 1;
static_assert(!SOME_ROWS<bf16> || SOME_TILE_ROWS < TILE_ROWS); // by which linear tells some rows from others
template <class T>
static inline bool some_rows_pay(int64_t rows, int64_t columns) {
    constexpr int64_t MOST_ROWS = 192, MOST_BYTES = 600 << 10, LEAST_BYTES = 1536;
    const int64_t block = block_columns<T>(columns), bytes = panel_bytes<T>(block);
    const int64_t few = block < columns ? FEW_TILES<T> * TILE_ROWS : TILE_ROWS;
    return SOME_ROWS<T> && rows > few && rows <= MOST_ROWS && bytes >= LEAST_BYTES && rows * bytes <= MOST_BYTES;
}

// out[m, n] (+)= x[m, :] . w[n, :] over a block of columns, from a panel of M rows and N rows of the weights as they
// lie in memory. Beside each unit of columns so many `units` of what comes `later` are asked for. The loop is that of
// memory_sums once more, for the reason that part_tile has.
template <class T, int M, int N>
static inline void some_tile(float *out, int64_t out_row, const char *x, const T *const (&w)[N], int64_t columns,
                             bool first, Stream<T> &later, int64_t units) {
    using P = Product<T>;
    Vec sum[M * N];
    clear<M, N>(sum);
    typename P::Reg r[1], wv[N];
    int64_t c = 0;
    for (; c + P::COLUMNS <= columns; c += P::COLUMNS, x += M * REG) {
        for (int n = 0; n < N; ++n) {
            P::unit(r, w[n] + c);
            wv[n] = r[0];
        }
        for (int64_t unit = 0; unit < units; ++unit) later.ask();
        multiply<T, M, N>(sum, x, wv);
    }
    if (c < columns) {
        for (int n = 0; n < N; ++n) {
            P::unit(r, w[n] + c, columns - c);
            wv[n] = r[0];
        }
        multiply<T, M, N>(sum, x, wv);
    }
    add_sums<M, N>(out, out_row, sum, first);
}

// The features [begin, end), a multiple of SOME_FEATURES. What comes next is asked for row after row, evenly beside all
// tiles; where there are more tiles than features, a row beside each of the first, and as much of what follows that: 32
// rows of 896 columns took 298 us, 319 evenly, and 192 rows of 1536 took 5350, 5540 with a row beside each tile. (16
// rows of the above, at 570: asked for twice as early, or both, 610.) The tiles are taken back and forth, so that those
// that were last are still in the first-level cache: without that, 16 rows took 9 % more. To begin a tile within the
// end of the one before, as panel_tiles does, gains 2 % with 128 rows and loses 8 % with 24 rows of 8960 columns.
template <class T>
static void some_features(const LinearArgs &args, float *sums, int64_t first, int64_t last, int64_t begin,
                          int64_t end) {
    constexpr int N = SOME_FEATURES;
    const int64_t columns = args.x.length, block = block_columns<T>(columns), tiles = last - first;
    const int64_t top = tile_row(args, first);
    bool back = false;
    for (int64_t c = 0; c < columns; c += block) {
        const int64_t width = columns - c < block ? columns - c : block, bytes = panel_bytes<T>(width);
        for (int64_t n = begin; n < end; n += N, back = !back) {
            // What comes next: more features of this block, the next block, or the first one of what lies behind.
            const int64_t at = n + N < end ? c : c + width < columns ? c + width : 0;
            int64_t next = n + N == end && at > 0 ? begin : n + N;
            if (next + N > args.weight.count) next = n;
            Stream<T> later = stream_from<T>(args, next, at);

            const T *w[N];
            for (int i = 0; i < N; ++i) w[i] = weights<T>(args, n + i) + c;
            for (int64_t turn = 0; turn < tiles; ++turn) {
                const int64_t tile = back ? last - 1 - turn : first + turn, row = tile_row(args, tile);
                const int64_t share = (turn + 1) * N / tiles - turn * N / tiles,
                              units = share > 1 ? share : turn < 2 * N;
                float *out = sums + (row - top) * LINEAR_FEATURES + (n - begin);
                with_rows<SOME_TILE_ROWS>(tile_row(args, tile + 1) - row, [&]<int M>() {
                    some_tile<T, M, N>(out, LINEAR_FEATURES, block_of<T>(args, c) + row * bytes, w, width, c == 0,
                                       later, units);
                });
            }
        }
    }
}

template <class T>
static void some_rows(const LinearArgs &args, float *sums, int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t whole = begin + (end - begin) / SOME_FEATURES * SOME_FEATURES;
    if constexpr (SOME_ROWS<T>) some_features<T>(args, sums, first, last, begin, whole);
    for (int64_t n = whole; n < end; ++n) few_features<T, 1>(args, sums + (n - begin), first, last, n, end);
}

} // namespace llaisys::LLAISYS_TIER
