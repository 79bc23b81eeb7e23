// Few rows of x times the weights on their way from memory.
#pragma once

#include "linear_panel.h"

namespace llaisys::LLAISYS_TIER {

// Whether elements are multiplied as they are read, and not widened first; and whether so quickly, 16 at a time, that x
// had better not come from the second-level cache.
template <class T>
constexpr bool AS_READ = sizeof(T) == sizeof(float) || Product<T>::REGS == 1;
template <class T>
constexpr bool FAST = Vec::N == 16 && AS_READ<T>;
// Up to this many tiles of rows are multiplied by the weights where they lie, see few_rows, unless some_rows is better.
// For 8960 features of 1536 columns, few_rows and many_rows took, in ms: 16 rows of bf16 0.71, 0.84, and 24 rows 1.15,
// 1.01; 24 rows of f16 1.84, 1.93; in AVX2 12 rows of bf16 1.78, 2.12, and 16 rows 2.34, 2.04.
template <class T>
constexpr int64_t FEW_TILES = Vec::N == 16 && !FAST<T> ? 6 : 3;

// What lies this many bytes further in a row of weights is asked for while the row is read: the processor's own
// prefetcher stops at the end of a page. What is widened first leaves less room for requests between the products: one
// row times 8960 features of 1536 columns, 8 at a time, took 440 us in f16 with 1024 bytes and 390 to 420 with 1536
// while memory was fast (both 640 while it was slow), where bf16 took 375 and 371 to 396.
template <class T>
constexpr int64_t AHEAD = AS_READ<T> ? 1024 : 1536;

// The block that starts with column c, of one row of the weights after the other, from n on.
template <class T>
static inline Stream<T> stream_from(const LinearArgs &args, int64_t n, int64_t c) {
    const int64_t left = args.x.length - c, block = block_columns<T>(args.x.length);
    const int64_t bytes = (left < block ? left : block) * int64_t(sizeof(T));
    const char *const at = (const char *)(weights<T>(args, n) + c);
    return {at, at + bytes, bytes, args.weight.step[0]};
}

// N rows of the weights, straight from memory. The first tile of x brings a block of them into the first-level cache,
// where the others find it; while the second one is multiplied, the next block is asked for.
template <class T, int N>
static inline void few_features(const LinearArgs &args, float *sums, int64_t first, int64_t last, int64_t n,
                                int64_t end) {
    constexpr int64_t FAR = AHEAD<T> / int64_t(sizeof(T));
    const int64_t columns = args.x.length, block = block_columns<T>(columns);
    const T *w[N], *next[N], *coming[N];
    for (int i = 0; i < N; ++i) {
        w[i] = weights<T>(args, n + i);
        next[i] = weights<T>(args, n + N + i < end ? n + N + i : n + i);
    }
    for (int64_t c = 0; c < columns; c += block) {
        const int64_t width = columns - c < block ? columns - c : block, bytes = panel_bytes<T>(width);
        for (int i = 0; i < N; ++i) coming[i] = (c + width < columns ? w[i] + width : next[i]) + FAR;
        for_tiles(args, first, last, [&]<int M>(int64_t tile, int64_t row) {
            const int64_t left = columns - c - FAR; // until FAR columns further is the next row
            const int64_t turn = tile == first && left > 0 ? left : 0;
            memory_tile<T, M, N>(sums + (row - tile_row(args, first)) * LINEAR_FEATURES, LINEAR_FEATURES,
                                 block_of<T>(args, c) + row * bytes, w, width, c == 0,
                                 tile == first           ? next
                                     : tile == first + 1 ? coming
                                                         : w,
                                 FAR, turn);
        });
        for (const T *&p : w) p += width;
    }
}

// Of few rows, so much of x is read again for every N features: it stays in the first-level cache beside the weights.
// 16 rows of 1536 columns in bf16 are as large as that cache and came from the second-level one: 0.84 ms for 8960
// features, 0.71 in parts, of which reading the weights is 0.55. 9 rows lose in parts, 0.76 ms against 0.68, and so do
// f16 (18 rows 1.50 against 1.42) and AVX2 (12 rows of f32 2.15 against 1.94, of 8960 columns).
// (In bf16 some_rows has taken the place of that since, but for rows of more than one block.)
constexpr int64_t FEW_BYTES = 40 << 10;
// Else x is cut into parts of the blocks, of about PART_BYTES for all rows, and the sums of PART_FEATURES features are
// kept lane by lane from one part to the next.
constexpr int64_t PART_FEATURES = 16, PART_BYTES = 12 << 10;

// The features [begin, end), PART_FEATURES at most and a multiple of N, part after part. Beside the first tiles the
// weights of the next but one N features are asked for: of this part, of the next one, or behind the last. They come
// from the second-level cache by then, as beside all tiles, evenly, the next block of all these features is asked for,
// or that of those behind them, row after row: in parts of rows memory gives less than in one stream. 16 rows of bf16
// took, with slow memory, 768 us for 8960 features of 1536 columns without that and 664 with it, 734 and 667 for 1536
// of 8960; with fast memory, where the products take longer than the weights, 658 and 682, 708 and 718. Only that, and
// not the nearer ones, took 651 and 687, 683 and 722, but 18 rows 895 in place of 766; asked for beside two tiles of
// three, as near and as many, 670 to 690; into the second-level cache only, 710.
template <class T, int N>
static void few_parts(const LinearArgs &args, float *sums, float *lanes, int64_t first, int64_t last, int64_t begin,
                      int64_t end) {
    const int64_t columns = args.x.length, block = block_columns<T>(columns), top = tile_row(args, first);
    const int64_t tiles = last - first;
    const int64_t fit = PART_BYTES / (panel_bytes<T>(1) * (tile_row(args, last) - top));
    const int64_t part = (fit < 4 ? 4 : fit) * Product<T>::COLUMNS;
    const auto lanes_of = [&](int64_t row, int64_t n, int64_t rows) {
        return lanes + ((row - top) * PART_FEATURES + (n - begin) * rows) * Vec::N;
    };
    for (int64_t c = 0; c < columns; c += block) {
        const int64_t width = columns - c < block ? columns - c : block, bytes = panel_bytes<T>(width);
        const int64_t follows = c + width < columns ? c + width : 0; // the column that comes after this block
        const int64_t from = follows > 0 || end == args.weight.count ? begin : end;
        Stream<T> later = stream_from<T>(args, from, follows);
        for (int64_t at = 0; at < width; at += part) {
            const int64_t wide = width - at < part ? width - at : part;
            for (int64_t n = begin; n < end; n += N) {
                int64_t coming = n + 2 * N, column = c + at;
                if (coming >= end) {
                    column = column + wide < columns ? column + wide : 0;
                    if (column > 0) coming -= end - begin;
                }
                const T *w[N], *next[N];
                for (int i = 0; i < N; ++i) {
                    const bool there = coming + i >= begin && coming + i < args.weight.count;
                    w[i] = weights<T>(args, n + i) + c + at;
                    next[i] = weights<T>(args, there ? coming + i : n) + column;
                }
                for_tiles(args, first, last, [&]<int M>(int64_t tile, int64_t row) {
                    const int64_t turn = tile - first, units = (turn + 1) * N / tiles - turn * N / tiles; // 1 or 2
                    part_tile<T, M, N>(lanes_of(row, n, M), block_of<T>(args, c) + row * bytes + panel_bytes<T>(at) * M,
                                       w, wide, at == 0, 2 * turn < N ? next + 2 * turn : nullptr, later, units > 1);
                });
            }
        }
        for_tiles(args, first, last, [&]<int M>(int64_t, int64_t row) {
            for (int64_t n = begin; n < end; n += N) {
                Vec sum[M * N];
                for (int m = 0; m < M; ++m)
                    for (int i = 0; i < N; ++i) sum[m * N + i] = load(lanes_of(row, n, M) + (m * N + i) * Vec::N);
                add_sums<M, N>(sums + (row - top) * LINEAR_FEATURES + (n - begin), LINEAR_FEATURES, sum, c == 0);
            }
        });
    }
}

// Whether the weights of a tile of x are read row after row, in one stream: where sums need not wait for each other,
// and x stays in the first-level cache beside the weights. The processor follows one stream better than several. 8960
// features of 1536 columns took, in us, with 4 or 8 rows at a time and in one stream: one row in bf16 348 and 272
// (while memory was slow 570 and 520), in f16 390 and 312 (580 and 496), in f32 690 and 660 (1040 and 1030); four rows
// in bf16 431 and 338. With more of x at hand, one row of f32 times 4096 features of 4096 columns took 790 and 840, and
// in AVX2, where a sum adds twice for 32 bytes and a conversion comes first, one row of bf16 360 and 528.
template <class T>
static inline bool in_stream(int64_t rows, int64_t columns) {
    constexpr bool WAITS = Vec::N < 16 && !AS_READ<T>, HALF = sizeof(T) < sizeof(float);
    const int64_t most = HALF && (AS_READ<T> || rows == 1) ? 20 << 10 : 12 << 10;
    const int64_t bytes = rows == 1 ? columns * int64_t(sizeof(T)) : rows * panel_bytes<T>(columns);
    return !WAITS && bytes <= most;
}

// memory_sums of a single row of x and one of the weights, both as they lie in memory: of f16 that is half as much of x
// as in a panel. 8960 columns, which then stay in the first-level cache, took 585 us for 1536 features, and 680 before.
template <class T>
static inline Vec row_sum(const T *x, const T *w, int64_t columns, const T *next) {
    using P = Product<T>;
    typename P::Reg xv[P::REGS], wv[P::REGS];
    Vec sum = zero();
    int64_t c = 0;
    for (; c + P::COLUMNS <= columns; c += P::COLUMNS) {
        P::unit(xv, x + c);
        P::unit(wv, w + c);
        for (int64_t line = 0; line < P::COLUMNS; line += 64 / int64_t(sizeof(T))) __builtin_prefetch(next + c + line);
        for (int i = 0; i < P::REGS; ++i) sum = P::add(xv[i], wv[i], sum);
    }
    if (c < columns) {
        P::unit(xv, x + c, columns - c);
        P::unit(wv, w + c, columns - c);
        for (int i = 0; i < P::REGS; ++i) sum = P::add(xv[i], wv[i], sum);
    }
    return sum;
}

// The features [begin, end) of M rows of x, row after row of the weights. What is asked for lies whole rows further,
// about 8 KiB: with 2 KiB rows of 3 KiB cost 5 to 10 %, with 16 KiB no less. Lanes are added for TOGETHER blocks of
// rows together. To take long rows block by block, 32 at a time, breaks the stream: one row of bf16 times 1536 features
// of 8960 columns 653 us, and 551 whole.
template <class T, int M>
static void stream_features(const LinearArgs &args, float *sums, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t FAR = 8192;
    constexpr int TOGETHER = M < 3 ? 8 / M : 2;
    const int64_t columns = args.x.length, block = block_columns<T>(columns), bytes = columns * int64_t(sizeof(T));
    const int64_t later = (FAR + bytes - 1) / bytes, last = args.weight.count - 1;
    const T *x = (const T *)row_at(args.x, args.row + row);
    int64_t n = begin, c = 0;
    while (n < end) {
        Vec sum[TOGETHER * M];
        float *to[TOGETHER];
        bool first[TOGETHER];
        int count = 0;
        for (; count < TOGETHER && n < end; ++count) {
            const int64_t width = columns - c < block ? columns - c : block;
            const T *const w[1] = {weights<T>(args, n) + c};
            const T *const next[1] = {weights<T>(args, n + later < last ? n + later : last) + c};
            Vec own[M];
            if constexpr (M == 1)
                own[0] = row_sum(x + c, w[0], width, next[0]);
            else
                memory_sums<T, M, 1>(own, block_of<T>(args, c) + row * panel_bytes<T>(width), w, width, next, 0, 0);
            for (int m = 0; m < M; ++m) sum[count * M + m] = own[m];
            to[count] = sums + (n - begin);
            first[count] = c == 0;
            c += width;
            if (c == columns) {
                c = 0;
                ++n;
            }
        }
        for (int i = count * M; i < TOGETHER * M; ++i) sum[i] = zero();
        float added[(TOGETHER * M + Vec::N - 1) / Vec::N * Vec::N];
        hsums<TOGETHER * M>(added, sum);
        for (int i = 0; i < count; ++i)
            for (int m = 0; m < M; ++m) {
                float &at = to[i][m * LINEAR_FEATURES];
                at = first[i] ? added[i * M + m] : at + added[i * M + m];
            }
    }
}

// The features [begin, end) of a single row of x, N at a time; returns the first one that is left.
template <class T, int N>
static int64_t row_features(const LinearArgs &args, float *sums, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t FAR = AHEAD<T> / int64_t(sizeof(T));
    const int64_t columns = args.x.length, block = block_columns<T>(columns);
    const int64_t left = columns > FAR ? columns - FAR : 0; // until FAR columns further is the next row
    int64_t n = begin;
    for (; n + N <= end; n += N, sums += N) {
        const T *w[N], *next[N];
        for (int i = 0; i < N; ++i) {
            w[i] = weights<T>(args, n + i);
            next[i] = weights<T>(args, n + 2 * N <= end ? n + N + i : n + i);
        }
        for (int64_t c = 0; c < columns; c += block) {
            const int64_t width = columns - c < block ? columns - c : block;
            Vec sum[N];
            memory_sums<T, 1, N>(sum, block_of<T>(args, c) + row * panel_bytes<T>(width), w, width, next, FAR,
                                 left - c);
            add_sums<1, N>(sums, LINEAR_FEATURES, sum, c == 0);
            for (int i = 0; i < N; ++i) w[i] += width;
        }
    }
    return n;
}

// `lanes` is for REG * PART_FEATURES bytes of each row.
template <class T>
static void few_rows(const LinearArgs &args, float *sums, float *lanes, int64_t first, int64_t last, int64_t begin,
                     int64_t end) {
    // Rows of the weights: as many as there are registers for. In AVX2, a single row of x times 1536 features of 8960
    // columns takes 345 us in bf16 with 8 and 400 with 4, and in f32, of 4096 times 4096, 1530 and 1460.
    constexpr int N = Vec::N == 16 ? 4 : 2, SINGLE = AS_READ<T> && Vec::N < 16 ? 4 : 8;
    const int64_t rows = tile_row(args, last) - tile_row(args, first);
    int64_t n = begin;
    if (last - first == 1 && in_stream<T>(rows, args.x.length))
        return with_rows(rows, [&]<int M>() { stream_features<T, M>(args, sums, tile_row(args, first), begin, end); });
    if (rows == 1) n = row_features<T, SINGLE>(args, sums, tile_row(args, first), n, end);
    if (FAST<T> && rows * panel_bytes<T>(block_columns<T>(args.x.length)) > FEW_BYTES)
        while (n + N <= end) {
            const int64_t stop = end - n < PART_FEATURES ? n + (end - n) / N * N : n + PART_FEATURES;
            few_parts<T, N>(args, sums + (n - begin), lanes, first, last, n, stop);
            n = stop;
        }
    for (; n + N <= end; n += N) few_features<T, N>(args, sums + (n - begin), first, last, n, end);
    for (; n < end; ++n) few_features<T, 1>(args, sums + (n - begin), first, last, n, end);
}

} // namespace llaisys::LLAISYS_TIER
