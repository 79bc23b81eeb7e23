// linear in bf16 and f16 on AMX tiles.
//
// A tile product adds, for 16 rows of the weights and up to 16 rows of x, 32 columns to a tile of f32 sums, pair of
// columns after pair. The weights are the first operand, row by row as they lie in the checkpoint; x is the second,
// packed once into pairs of columns: [block of 16 rows][pair of columns][row]. An element adds its products step after
// step over all columns, in one tile or in several in turn that are stored and loaded exactly, so it has one order of
// accumulation, whatever is computed beside it. The processor takes subnormal bf16 numbers for zero in these products
// and flushes subnormal sums; the bound of the SPEC says so.
//
// A number in f16 is the sum of two bf16 numbers (f16_parts.h). So a dot product in f16 is the sum of four in bf16, and
// none of them can be left out: the product of the low parts is up to 2^-14 of the whole. Two tiles of weights are then
// the high and the low parts of 16 rows in place of 32 rows, and two blocks of x are those of 16 rows of x. At best
// that is a quarter of the bf16 products, 1.6 TFLOP/s where FMA in f32 has 0.4.
#pragma once

#include "core/tier.h"

#include "core/amx.h"
#include "f16_parts.h"

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
// How 32 columns of a row become bf16 pairs: as they are, or in two parts, the high one first. f32 would take three
// parts and six products, and stays with FMA.
template <class T>
struct Parts {
    static constexpr int COUNT = 0;
};
template <>
struct Parts<bf16> {
    static constexpr int COUNT = 1;
    static inline void load(__m512i (&part)[COUNT], const bf16 *p, int64_t columns) {
        const __mmask32 mask = columns < TILE_COLUMNS ? (1u << columns) - 1 : ~0u;
        part[0] = _mm512_maskz_loadu_epi16(mask, p);
    }
};
template <>
struct Parts<f16> {
    static constexpr int COUNT = 2;
    // A pair is column i and column i + 16: a shift and a mask put it together, where neighbours would need a shuffle.
    // For infinities and NaNs see add_parts.
    static inline void load(__m512i (&part)[COUNT], const f16 *p, int64_t columns) {
        Vec a, b;
        columns < TILE_COLUMNS ? load2(p, columns, a, b) : load2(p, a, b);
        const F16Parts left = parts_of(a), right = parts_of(b);
        part[0] = paired(left.high, right.high);
        part[1] = paired(_mm512_castps_si512(left.low.v), _mm512_castps_si512(right.low.v));
    }
};
// Whether linear in T runs on tiles.
template <class T>
constexpr bool ON_TILES = Parts<T>::COUNT > 0;
// Rows of weights that two tiles hold.
template <class T>
constexpr int64_t GROUP = 2 * TILE / Parts<T>::COUNT;

// Rows of x in a block of the panel: all of a few rows, else 16.
static inline int64_t block_rows(int64_t rows) { return rows < TILE ? rows : TILE; }
static inline int64_t tile_blocks(int64_t rows) { return (rows + TILE - 1) / TILE; }
static inline int64_t block_row(int64_t rows, int64_t block) { return block * TILE < rows ? block * TILE : rows; }
// bf16 elements of one block of the panel, or of one part of it.
static inline int64_t panel_block(int64_t rows, int64_t columns) {
    return tile_steps(columns) * TILE_COLUMNS * block_rows(rows);
}
template <class T>
static inline int64_t tile_panel_bytes(int64_t rows, int64_t columns) {
    return tile_blocks(rows) * Parts<T>::COUNT * panel_block(rows, columns) * int64_t(sizeof(bf16));
}
// Two tiles of sums for each block of x and part of it, and a chunk of two tiles of weights.
template <class T>
static inline int64_t tile_work_bytes(int64_t rows) {
    return tile_blocks(rows) * Parts<T>::COUNT * 2 * TILE * TILE * int64_t(sizeof(float)) +
        2 * TILE * TILE_CHUNK * int64_t(sizeof(bf16));
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

// Packs the rows of x from `row` on into one block of the panel, part behind part; `count` of its `width` rows exist,
// the others are zero.
template <class T>
static inline void pack_block(bf16 *panel, const Rows &x, int64_t row, int64_t count, int64_t width) {
    constexpr int PARTS = Parts<T>::COUNT;
    const int64_t steps = tile_steps(x.length);
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t c = step * TILE_COLUMNS;
        const auto load_row = [&](__m512i(&part)[PARTS], int64_t i) {
            Parts<T>::load(part, (const T *)row_at(x, row + i) + c, x.length - c);
        };
        const auto out_of = [&](int k) { return panel + (k * steps + step) * TILE_COLUMNS * width; };
        if (width == 1) { // one row in pairs is that row
            __m512i part[PARTS];
            load_row(part, 0);
            for (int k = 0; k < PARTS; ++k) _mm512_storeu_si512(out_of(k), part[k]);
            continue;
        }
        __m512i r[PARTS][16];
        for (int64_t i = 0; i < TILE; ++i) {
            __m512i part[PARTS] = {};
            if (i < count) load_row(part, i);
            for (int k = 0; k < PARTS; ++k) r[k][i] = part[k];
        }
        for (int k = 0; k < PARTS; ++k) {
            bf16 *out = out_of(k);
            transpose(r[k]);
            const auto kept = __mmask16((1u << width) - 1);
            for (int64_t i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(out + i * 2 * width, kept, r[k][i]);
        }
    }
}
// The blocks [begin, end) of the panel of `rows` rows of x from `row` on.
template <class T>
static inline void pack_blocks(bf16 *panel, const Rows &x, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    const int64_t size = Parts<T>::COUNT * panel_block(rows, x.length);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block_row(rows, block), count = block_row(rows, block + 1) - first;
        pack_block<T>(panel + block * size, x, row + first, count, block_rows(rows));
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

// Two tiles of weights: 32 rows, or 16 in two parts.
struct alignas(64) WeightTiles {
    bf16 tile[2][TILE][TILE_COLUMNS];
};
// Copies a group of rows from column c on; where rows or columns are missing, there are zeros.
template <class T>
static inline void copy_weights(WeightTiles &to, const Rows &weight, int64_t n, int64_t count, int64_t c) {
    constexpr int PARTS = Parts<T>::COUNT;
    for (int64_t i = 0; i < GROUP<T>; ++i) {
        __m512i part[PARTS] = {};
        if (i < count) Parts<T>::load(part, (const T *)row_at(weight, n + i) + c, weight.length - c);
        for (int k = 0; k < PARTS; ++k) _mm512_store_si512(to.tile[PARTS == 1 ? i / TILE : k][i % TILE], part[k]);
    }
}

// Asks for what is needed next in the rows of a group of weights.
template <class T>
static inline void fetch_rows(const char *at, int64_t step, int64_t count) {
    for (int64_t i = 0; i < count && i < GROUP<T>; ++i) __builtin_prefetch(at + i * step);
}

// A part of the product: a group of features from n on, `count` of them, times up to two blocks of x or parts of one,
// over the columns [begin, end).
struct TilePart {
    const Rows &weight;
    int64_t n, count, begin, end;
    const WeightTiles *copied; // of each step, or NULL: they are read where they lie
    const char *ahead;         // for each row of weights, at the distance of the rows: what is read next, or NULL
    const bf16 *x;             // the block of the panel, from column 0 on
    int64_t block, width;
    float *saved; // sums of [block of x][tile of weights]
    bool load;
};

// The sums of one or two blocks of x and one or two tiles of weights.
template <class T, bool TWO, bool WIDE>
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
    // Whole tiles of bf16 are read where they lie. Others are copied; the copy is made a step before it is needed, as
    // a tile is not loaded from stores that are still on their way.
    const bool whole_rows = !p.copied && Parts<T>::COUNT == 1 && p.count >= (WIDE ? 2 : 1) * TILE;
    const auto in_place = [&](int64_t c) { return whole_rows && p.weight.length - c >= TILE_COLUMNS; };
    WeightTiles copies[2];
    const auto copy = [&](int64_t c) {
        if (p.copied || c >= p.end || in_place(c)) return;
        copy_weights<T>(copies[c / TILE_COLUMNS % 2], p.weight, p.n, p.count, c);
    };
    copy(p.begin);
    for (int64_t c = p.begin; c < p.end; c += TILE_COLUMNS) {
        copy(c + TILE_COLUMNS);
        const WeightTiles &own = p.copied ? p.copied[(c - p.begin) / TILE_COLUMNS] : copies[c / TILE_COLUMNS % 2];
        const char *a = (const char *)own.tile[0], *b = (const char *)own.tile[1];
        int64_t step = TILE_COLUMNS * int64_t(sizeof(bf16));
        if (in_place(c)) {
            step = p.weight.step[0];
            a = row_at(p.weight, p.n) + c * int64_t(sizeof(bf16));
            b = a + TILE * step;
        }
        tile_load<6>(p.x + c * p.width, p.width * 4);
        tile_load<4>(a, step);
        tile_dot<0, 4, 6>();
        if (TWO) {
            tile_load<7>(p.x + p.block + c * p.width, p.width * 4);
            tile_dot<1, 4, 7>();
        }
        if (WIDE) {
            tile_load<5>(b, step);
            tile_dot<2, 5, 6>();
            if (TWO) tile_dot<3, 5, 7>();
        }
        if (p.ahead) fetch_rows<T>(p.ahead + (c - p.begin) * int64_t(sizeof(T)), p.weight.step[0], p.count);
    }
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

// The four tiles of sums of [part of x][part of the weights] to one, in place of the first: the small ones first. Where
// there are infinities or NaNs the high parts have the result, and the others NaNs.
static inline void add_parts(float *tiles) {
    constexpr int64_t SIZE = TILE * TILE;
    for (float *at = tiles; at < tiles + SIZE; at += TILE) {
        const Vec high = load(at), sum = high + ((load(at + SIZE) + load(at + 2 * SIZE)) + load(at + 3 * SIZE));
        store(at, Vec{_mm512_mask_mov_ps(high.v, finite_mask(high), sum.v)});
    }
}

// The sums of the blocks [first, last) of a panel of `rows` rows and the features [begin, end) of the weights.
template <class T>
static inline void tile_sums(float *sums, int64_t sums_row, const Rows &weight, const bf16 *panel, int64_t rows,
                             int64_t first, int64_t last, int64_t begin, int64_t end, char *work) {
    constexpr int PARTS = Parts<T>::COUNT;
    constexpr int64_t SIZE = TILE * TILE;
    const int64_t width = block_rows(rows), block = panel_block(rows, weight.length), columns = weight.length;
    const int64_t blocks = (last - first) * PARTS;
    panel += first * PARTS * block;
    auto *saved = (float *)work;
    auto *copied = (WeightTiles *)(saved + blocks * 2 * SIZE);
    // One block of x needs no chunks, as nothing of the weights is read twice. Parts are made once for all blocks.
    const bool once = last - first == 1, copy = PARTS > 1 ? !once : blocks >= TILE_COPIED;
    const int64_t chunk = once ? columns : TILE_CHUNK;
    configure_tiles(width);
    for (int64_t n = begin; n < end; n += GROUP<T>) {
        const int64_t count = end - n < GROUP<T> ? end - n : GROUP<T>;
        const bool wide = PARTS > 1 || count > TILE;
        for (int64_t c = 0; c < columns; c += chunk) {
            const int64_t until = columns - c < chunk ? columns : c + chunk;
            if (copy)
                for (int64_t at = c; at < until; at += TILE_COLUMNS)
                    copy_weights<T>(copied[(at - c) / TILE_COLUMNS], weight, n, count, at);
            // 1 KiB, a chunk, further on, or the next features' first one.
            const int64_t far = once && c + TILE_CHUNK < columns ? c + TILE_CHUNK : until;
            const int64_t following = n + GROUP<T> < end ? n + GROUP<T> : n;
            const char *ahead =
                far < columns ? row_at(weight, n) + far * int64_t(sizeof(T)) : row_at(weight, following);
            for (int64_t m = 0; m < blocks; m += 2) {
                const TilePart part{weight,
                                    n,
                                    count,
                                    c,
                                    until,
                                    copy ? copied : nullptr,
                                    m == 0 ? ahead : nullptr,
                                    panel + m * block,
                                    block,
                                    width,
                                    saved + m * 2 * SIZE,
                                    c > 0};
                if (blocks - m > 1)
                    wide ? tile_product<T, true, true>(part) : tile_product<T, true, false>(part);
                else
                    wide ? tile_product<T, false, true>(part) : tile_product<T, false, false>(part);
            }
        }
        for (int64_t m = 0; m < last - first; ++m) {
            const int64_t left = rows - (first + m) * TILE, there = left < TILE ? left : TILE;
            float *tiles = saved + m * PARTS * 2 * SIZE, *out = sums + m * TILE * sums_row + (n - begin);
            if constexpr (PARTS > 1) add_parts(tiles);
            for (int64_t at = 0; at < count; at += TILE)
                turn_tile(out + at, sums_row, tiles + at / TILE * SIZE, there, count - at);
        }
    }
    tile_release();
}

} // namespace llaisys::LLAISYS_TIER
