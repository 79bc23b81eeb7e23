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
// Up to this many tiles of rows are multiplied by the weights where they lie, see few_rows. For 8960 features of 1536
// columns, few_rows and many_rows took, in ms: 16 rows of bf16 0.71, 0.84, and 24 rows 1.15, 1.01; 24 rows of f16 1.84,
// 1.93; in AVX2 12 rows of bf16 1.78, 2.12, and 16 rows 2.34, 2.04.
template <class T>
constexpr int64_t FEW_TILES = Vec::N == 16 && !FAST<T> ? 6 : 3;

// What lies this many bytes further in a row of weights is asked for while the row is read: the processor's own
// prefetcher stops at the end of a page. What is widened first leaves less room for requests between the products: one
// row times 8960 features of 1536 columns in f16 takes 440 us with 1024 bytes and 390 to 420 with 1536 while memory is
// fast (both 640 while it is slow), where bf16 takes 375 and 371 to 396.
template <class T>
constexpr int64_t AHEAD = AS_READ<T> ? 1024 : 1536;

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
constexpr int64_t FEW_BYTES = 40 << 10;
// Else x is cut into parts of the blocks, of about PART_BYTES for all rows, and the sums of PART_FEATURES features are
// kept lane by lane from one part to the next.
constexpr int64_t PART_FEATURES = 16, PART_BYTES = 12 << 10;

// The features [begin, end), PART_FEATURES at most and a multiple of N, part after part. Beside the first tiles the
// weights of the next but one N features are asked for: of this part, of the next one, or behind the last.
template <class T, int N>
static void few_parts(const LinearArgs &args, float *sums, float *lanes, int64_t first, int64_t last, int64_t begin,
                      int64_t end) {
    const int64_t columns = args.x.length, block = block_columns<T>(columns), top = tile_row(args, first);
    const int64_t fit = PART_BYTES / (panel_bytes<T>(1) * (tile_row(args, last) - top));
    const int64_t part = (fit < 4 ? 4 : fit) * Product<T>::COLUMNS;
    const auto lanes_of = [&](int64_t row, int64_t n, int64_t rows) {
        return lanes + ((row - top) * PART_FEATURES + (n - begin) * rows) * Vec::N;
    };
    for (int64_t c = 0; c < columns; c += block) {
        const int64_t width = columns - c < block ? columns - c : block, bytes = panel_bytes<T>(width);
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
                    const int64_t pair = 2 * (tile - first);
                    part_tile<T, M, N>(lanes_of(row, n, M), block_of<T>(args, c) + row * bytes + panel_bytes<T>(at) * M,
                                       w, wide, at == 0, pair < N ? next + pair : nullptr);
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

// The features [begin, end) of a single row of x; returns the first one that is left, as they are taken N at a time.
// Short rows of weights are over so soon that all that can be is worked out before, and that lanes are added for
// several tiles together: with 1152 features of 224 columns in the third-level cache, a thread went from 8.0 to 5.9 us.
// Two rows and more lost by it, 6 of f16 20 %.
template <class T, int N>
static int64_t one_row(const LinearArgs &args, float *sums, int64_t row, int64_t begin, int64_t end) {
    constexpr int64_t FAR = AHEAD<T> / int64_t(sizeof(T));
    constexpr int TOGETHER = N < 8 ? 4 : 2; // tiles whose lanes are added together
    const int64_t columns = args.x.length, block = block_columns<T>(columns), step = args.weight.step[0];
    const int64_t left = columns > FAR ? columns - FAR : 0; // until FAR columns further is the next row
    const T *w[N], *next[N];
    const auto go_to = [&](int64_t n) {
        const char *at = (const char *)weights<T>(args, n);
        const int64_t following = n + 2 * N <= end ? N * step : 0;
        for (int i = 0; i < N; ++i) {
            w[i] = (const T *)(at + i * step);
            next[i] = (const T *)(at + following + i * step);
        }
    };
    int64_t n = begin;
    const char *x = block_of<T>(args, 0) + row * panel_bytes<T>(columns);
    for (; columns <= block && n + TOGETHER * N <= end; n += TOGETHER * N, sums += TOGETHER * N) {
        Vec sum[TOGETHER * N];
        for (int t = 0; t < TOGETHER; ++t) {
            Vec own[N];
            go_to(n + t * N);
            memory_sums<T, 1, N>(own, x, w, columns, next, FAR, left);
            for (int i = 0; i < N; ++i) sum[t * N + i] = own[i];
        }
        hsums<TOGETHER * N>(sums, sum);
    }
    for (; n + N <= end; n += N, sums += N) {
        go_to(n);
        for (int64_t c = 0; c < columns; c += block) {
            const int64_t width = columns - c < block ? columns - c : block;
            memory_tile<T, 1, N>(sums, LINEAR_FEATURES, block_of<T>(args, c) + row * panel_bytes<T>(width), w, width,
                                 c == 0, next, FAR, left - c);
            for (int i = 0; i < N; ++i) w[i] += width;
        }
    }
    return n;
}

// `lanes` is for REG * PART_FEATURES bytes of each row.
template <class T>
static void few_rows(const LinearArgs &args, float *sums, float *lanes, int64_t first, int64_t last, int64_t begin,
                     int64_t end) {
    // As many as there are registers for.
    constexpr int N = Vec::N == 16 ? 4 : 2;
    const int64_t rows = tile_row(args, last) - tile_row(args, first);
    int64_t n = begin;
    if (rows == 1) {
        // With 4 rows of weights at a time, 8960 of 1536 columns took 1.00 to 1.03 times as long while memory was
        // slow, 1.03 to 1.11 while it was fast; with 2, 1.2 times, with 12, 1.1 times.
        const auto take = [&]<int COUNT>() {
            n = one_row<T, COUNT>(args, sums + (n - begin), tile_row(args, first), n, end);
        };
        take.template operator()<2 * N>();
        take.template operator()<N>();
        take.template operator()<1>();
    }
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
