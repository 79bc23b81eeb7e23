// The arguments of linear's kernels, and the rows of x in vector registers: a panel of tiles.
#pragma once

#include "linear_tile.h"

namespace llaisys {

// Most rows of x that are packed and multiplied together, and, in vector registers, most output features of one part of
// the work: their sums and a block of the weights, LINEAR_FEATURES * BLOCK_BYTES, stay in the second-level cache.
[[maybe_unused]] constexpr int64_t LINEAR_ROWS = 516;
constexpr int64_t LINEAR_FEATURES = 96;

struct LinearArgs {
    Rows out, x, weight;
    const char *bias; // NULL or N elements
    char *panel;      // rows of x in the form that the kernel multiplies
    int64_t row;      // of x: the first in the panel
    int64_t rows;     // in the panel, at most LINEAR_ROWS
    int64_t tile;     // rows of a tile at most, as the plan says; 0 where matrix units take them
    int32_t dtype;
};

namespace LLAISYS_TIER {

// Of x: tiles of nearly the same number of rows. Tile t starts at row t * rows / tiles.
static inline int64_t tiles_of(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile; }
static inline int64_t tile_row(const LinearArgs &args, int64_t tile) {
    return tile * args.rows / tiles_of(args.rows, args.tile);
}

// Where the block of the panel that starts with column c begins, the first of a block.
template <class T>
static inline char *block_of(const LinearArgs &args, int64_t c) {
    return args.panel + panel_bytes<T>(c) * args.rows;
}

template <class T>
static inline const T *weights(const LinearArgs &args, int64_t n) {
    return (const T *)(args.weight.base + n * args.weight.step[0]);
}

// Calls `call` with `rows`, 1 to MOST, as a constant.
template <int64_t MOST = TILE_ROWS, class Call>
static inline void with_rows(int64_t rows, Call call) {
    switch (rows) {
    case 1: return call.template operator()<1>();
    case 2: return call.template operator()<2>();
    case 3: return call.template operator()<3>();
    case 4: return call.template operator()<4>();
    }
    if constexpr (MOST > 4) {
        if (rows == 5) return call.template operator()<5>();
        call.template operator()<6>();
    }
}

// Calls `call` with the rows of each of the tiles [first, last) as a constant, and with the tile and its first row.
template <class Call>
static inline void for_tiles(const LinearArgs &args, int64_t first, int64_t last, Call call) {
    for (int64_t tile = first; tile < last; ++tile) {
        const int64_t row = tile_row(args, tile);
        with_rows(tile_row(args, tile + 1) - row, [&]<int M>() { call.template operator()<M>(tile, row); });
    }
}

} // namespace LLAISYS_TIER
} // namespace llaisys
