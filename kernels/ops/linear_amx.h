// linear in bf16 on AMX tiles.
//
// A tile product adds, for 16 rows of the weights and up to 16 rows of x, 32 columns to a tile of f32 sums, pair of
// columns after pair. The weights are the first operand, row by row as they lie in the checkpoint; x is the second,
// packed once into pairs of columns: [block of 16 rows][pair of columns][row]. An element adds its products step after
// step over all columns, in one tile or in several in turn that are stored and loaded exactly, so it has one order of
// accumulation, whatever is computed beside it. The processor takes subnormal bf16 numbers for zero in these products
// and flushes subnormal sums; the bound of the SPEC says so.
#pragma once

#include "core/tier.h"

#include "core/amx.h"

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

constexpr int64_t TILE = 16;         // rows of a tile
constexpr int64_t TILE_COLUMNS = 32; // bf16 columns of a tile
// Columns of a chunk: 32 rows of weights, 32 KiB, stay in the first-level cache while all rows of x pass.
constexpr int64_t TILE_CHUNK = 512;
// From this many blocks of x on, a chunk of weights is copied first: rows a power of two apart would share few sets of
// the cache.
constexpr int64_t TILE_COPIED = 8;

static inline int64_t tile_steps(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
// Rows of x in a block of the panel: all of a few rows, else 16.
static inline int64_t block_rows(int64_t rows) { return rows < TILE ? rows : TILE; }
static inline int64_t tile_blocks(int64_t rows) { return (rows + TILE - 1) / TILE; }
// bf16 elements of one block of the panel.
static inline int64_t panel_block(int64_t rows, int64_t columns) {
    return tile_steps(columns) * TILE_COLUMNS * block_rows(rows);
}
static inline int64_t tile_panel_bytes(int64_t rows, int64_t columns) {
    return tile_blocks(rows) * panel_block(rows, columns) * int64_t(sizeof(bf16));
}
// Two tiles of sums for each block of x, and a chunk of two tiles of weights.
static inline int64_t tile_work_bytes(int64_t rows) {
    return tile_blocks(rows) * 2 * TILE * TILE * int64_t(sizeof(float)) + 2 * TILE * TILE_CHUNK * int64_t(sizeof(bf16));
}

// r[i][j] <- r[j][i] of 32-bit elements.
static inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Packs the rows of x from `row` on into one block of the panel; `count` of its `width` rows exist, the others are
// zero.
static inline void pack_block(bf16 *panel, const Rows &x, int64_t row, int64_t count, int64_t width) {
    for (int64_t step = 0; step < tile_steps(x.length); ++step) {
        const int64_t c = step * TILE_COLUMNS, left = x.length - c;
        const __mmask32 mask = left < TILE_COLUMNS ? (1u << left) - 1 : ~0u;
        __m512i r[16];
        for (int64_t i = 0; i < 16; ++i)
            r[i] = i < count ? _mm512_maskz_loadu_epi16(mask, (const bf16 *)row_at(x, row + i) + c)
                             : _mm512_setzero_si512();
        bf16 *out = panel + step * TILE_COLUMNS * width;
        if (width == 1) { // one row in pairs is that row
            _mm512_storeu_si512(out, r[0]);
            continue;
        }
        transpose(r);
        const auto kept = __mmask16((1u << width) - 1);
        for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + i * 2 * width, kept, r[i]);
    }
}

// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 x, of which `width` rows lie in a block.
static inline void configure_tiles(int64_t width) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = TILE;
        config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * width);
    }
    tile_configure(config);
}

// 16 rows of the weights as a tile operand: where they lie, or, where rows or columns are missing, as a copy filled up
// with zeros, so that nothing outside the tensor is read.
struct WeightTile {
    const char *at;
    int64_t step;
};
static inline WeightTile filled_tile(bf16 (&copy)[TILE][TILE_COLUMNS], const Rows &weight, int64_t n, int64_t count,
                                     int64_t c) {
    const int64_t left = weight.length - c;
    const __mmask32 mask = left < TILE_COLUMNS ? (1u << left) - 1 : ~0u;
    for (int64_t i = 0; i < TILE; ++i)
        _mm512_storeu_si512(copy[i],
                            i < count ? _mm512_maskz_loadu_epi16(mask, (const bf16 *)row_at(weight, n + i) + c)
                                      : _mm512_setzero_si512());
    return {(const char *)copy, sizeof copy[0]};
}
static inline WeightTile weight_tile(bf16 (&copy)[TILE][TILE_COLUMNS], const Rows &weight, int64_t n, int64_t count,
                                     int64_t c) {
    if (count < TILE || weight.length - c < TILE_COLUMNS) return filled_tile(copy, weight, n, count, c);
    return {(const char *)((const bf16 *)row_at(weight, n) + c), weight.step[0]};
}

// Asks for what is needed next in 16 rows of weights.
static inline void fetch_rows(const char *at, int64_t step, int64_t count) {
    for (int64_t i = 0; i < count && i < TILE; ++i) __builtin_prefetch(at + i * step);
}

// A part of the product: up to 32 features from n on, `count` of them, times up to two blocks of x, over the columns
// [begin, end).
struct TilePart {
    const Rows &weight;
    int64_t n, count, begin, end;
    const char *copied; // the chunk of weights, or NULL: they are read where they lie
    const char *ahead;  // for each row of weights, at the distance of the rows: what is read next, or NULL
    const bf16 *x;      // the block of the panel, from column 0 on
    int64_t block, width;
    float *saved; // sums of [block of x][half of the features]
    bool load, store;
};

// The sums of one or two blocks of x and one or two tiles of weights.
template <bool TWO, bool WIDE>
static inline void tile_product(const TilePart &p) {
    constexpr int64_t SIZE = TILE * TILE, STEP = TILE * int64_t(sizeof(float));
    if (p.load) {
        tile_load<0>(p.saved, STEP);
        if (WIDE) tile_load<2>(p.saved + SIZE, STEP);
        if (TWO) tile_load<1>(p.saved + 2 * SIZE, STEP);
        if (TWO && WIDE) tile_load<3>(p.saved + 3 * SIZE, STEP);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    alignas(64) bf16 filled[2][TILE][TILE_COLUMNS];
    for (int64_t c = p.begin; c < p.end; c += TILE_COLUMNS) {
        const auto weights = [&](int half) -> WeightTile {
            if (p.copied) return {p.copied + ((c - p.begin) / TILE_COLUMNS * 2 + half) * 1024, 64};
            return weight_tile(filled[half], p.weight, p.n + half * TILE, p.count - half * TILE, c);
        };
        const WeightTile a = weights(0);
        tile_load<6>(p.x + c * p.width, p.width * 4);
        tile_load<4>(a.at, a.step);
        tile_dot<0, 4, 6>();
        if (TWO) {
            tile_load<7>(p.x + p.block + c * p.width, p.width * 4);
            tile_dot<1, 4, 7>();
        }
        if (WIDE) {
            const WeightTile b = weights(1);
            tile_load<5>(b.at, b.step);
            tile_dot<2, 5, 6>();
            if (TWO) tile_dot<3, 5, 7>();
        }
        if (p.ahead) {
            const char *at = p.ahead + (c - p.begin) * int64_t(sizeof(bf16));
            fetch_rows(at, p.weight.step[0], p.count);
            if (WIDE) fetch_rows(at + TILE * p.weight.step[0], p.weight.step[0], p.count - TILE);
        }
    }
    if (!p.store) return;
    tile_store<0>(p.saved, STEP);
    if (WIDE) tile_store<2>(p.saved + SIZE, STEP);
    if (TWO) tile_store<1>(p.saved + 2 * SIZE, STEP);
    if (TWO && WIDE) tile_store<3>(p.saved + 3 * SIZE, STEP);
}

// A tile of sums is [n, m]: it is turned on its way out, to `rows` rows and `features` features.
static inline void turn_tile(float *sums, int64_t sums_row, const float *tile, int64_t rows, int64_t features) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(tile + i * TILE);
    transpose(r);
    const auto kept = __mmask16((1u << (features < TILE ? features : TILE)) - 1);
    for (int64_t i = 0; i < rows; ++i) _mm512_mask_storeu_epi32(sums + i * sums_row, kept, r[i]);
}

// The sums of the blocks [first, last) of a panel of `rows` rows and the features [begin, end) of the weights.
static inline void tile_sums(float *sums, int64_t sums_row, const Rows &weight, const bf16 *panel, int64_t rows,
                             int64_t first, int64_t last, int64_t begin, int64_t end, char *work) {
    const int64_t width = block_rows(rows), block = panel_block(rows, weight.length), columns = weight.length;
    auto *saved = (float *)work;
    auto *copied = (bf16(*)[TILE][TILE_COLUMNS])(saved + (last - first) * 2 * TILE * TILE);
    const bool copy = last - first >= TILE_COPIED;
    // One block of x needs no chunks, as nothing of the weights is read twice.
    const int64_t chunk = last - first == 1 ? columns : TILE_CHUNK;
    configure_tiles(width);
    for (int64_t n = begin; n < end; n += 2 * TILE) {
        const int64_t count = end - n < 2 * TILE ? end - n : 2 * TILE;
        for (int64_t c = 0; c < columns; c += chunk) {
            const int64_t until = columns - c < chunk ? columns : c + chunk;
            if (copy)
                for (int64_t at = c; at < until; at += TILE_COLUMNS)
                    for (int half = 0; half < 2; ++half)
                        filled_tile(copied[(at - c) / TILE_COLUMNS * 2 + half], weight, n + half * TILE,
                                    count - half * TILE, at);
            // 1 KiB, a chunk, further on, or the next features' first one.
            const int64_t far = last - first == 1 && c + TILE_CHUNK < columns ? c + TILE_CHUNK : until;
            const int64_t following = n + 2 * TILE < end ? n + 2 * TILE : n;
            const char *ahead =
                far < columns ? row_at(weight, n) + far * int64_t(sizeof(bf16)) : row_at(weight, following);
            for (int64_t m = first; m < last; m += 2) {
                const TilePart part{weight,
                                    n,
                                    count,
                                    c,
                                    until,
                                    copy ? (const char *)copied : nullptr,
                                    m == first ? ahead : nullptr,
                                    panel + m * block,
                                    block,
                                    width,
                                    saved + (m - first) * 2 * TILE * TILE,
                                    c > 0,
                                    true};
                if (last - m > 1)
                    count > TILE ? tile_product<true, true>(part) : tile_product<true, false>(part);
                else
                    count > TILE ? tile_product<false, true>(part) : tile_product<false, false>(part);
            }
        }
        for (int64_t m = first; m < last; ++m)
            for (int64_t half = 0; half * TILE < count; ++half) {
                const int64_t left = rows - m * TILE;
                turn_tile(sums + (m - first) * TILE * sums_row + (n - begin) + half * TILE, sums_row,
                          saved + ((m - first) * 2 + half) * TILE * TILE, left < TILE ? left : TILE,
                          count - half * TILE);
            }
    }
    tile_release();
}

} // namespace llaisys::LLAISYS_TIER
