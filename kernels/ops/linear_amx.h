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
#include "linear_panel.h"

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

constexpr int64_t TILE = 16;         // rows of a tile
constexpr int64_t TILE_COLUMNS = 32; // bf16 columns of a tile
// Columns of a chunk: of 32 rows of weights and of 32 rows of x it is 16 KiB each, which stay in the first-level cache
// with their sums while all rows of x pass.
constexpr int64_t TILE_CHUNK = 256;
// Columns of a piece, the chunks that a group of features has before the next group, at most: 4 KiB of each row of the
// weights. More rows of x have shorter pieces, so that X_BYTES of them stay in the second-level cache.
constexpr int64_t TILE_PIECE = 2048;
constexpr int64_t X_BYTES = 384 << 10;
// From this many blocks of x on, the lines of out are asked for before they are written: with fewer the weights need
// all requests.
constexpr int64_t OUT_AHEAD = 16;

static inline int64_t tile_steps(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
// How 32 columns of a row become bf16 pairs: as they are, or in two parts, the high one first. f32 would take three
// parts and six products; but tiles flush subnormal sums, for which its bound has no room, so it stays with FMA.
template <class T>
struct Parts {
    static constexpr int COUNT = 0;
};
template <>
struct Parts<bf16> {
    static constexpr int COUNT = 1;
    static inline void load(__m512i (&part)[COUNT], const bf16 *p, int64_t columns) {
        part[0] = columns < TILE_COLUMNS ? _mm512_maskz_loadu_epi16((1u << columns) - 1, p) : _mm512_loadu_si512(p);
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
// Features of a part of the work: x is read from afar once for all of them, a piece after the other, and for 512 rows
// their sums, 0.75 MiB in bf16 and 1 MiB in f16, stay in the second-level cache beside the piece.
template <class T>
constexpr int64_t TILE_FEATURES_AT_ONCE = Parts<T>::COUNT > 1 ? 128 : 384;
// The parts of so many columns but for the last one, `most` at most: they are as even as can be.
static inline int64_t even_columns(int64_t columns, int64_t most) {
    const int64_t steps = tile_steps(columns), parts = (columns + most - 1) / most;
    return parts < 2 ? columns : (steps + parts - 1) / parts * TILE_COLUMNS;
}
// The columns of a piece for so many bytes of x a column.
static inline int64_t piece_columns(int64_t columns, int64_t x_bytes) {
    const int64_t fit = X_BYTES / x_bytes / TILE_CHUNK * TILE_CHUNK;
    return even_columns(columns, fit < TILE_CHUNK ? TILE_CHUNK : fit < TILE_PIECE ? fit : TILE_PIECE);
}

// Two tiles of weights: 32 rows, or 16 in two parts.
struct alignas(64) WeightTiles {
    bf16 tile[2][TILE][TILE_COLUMNS];
};
// The copies of a chunk of weights; and for each group of features, block of x and part of it two tiles of sums.
constexpr int64_t TILE_COPIES = TILE_CHUNK / TILE_COLUMNS;
constexpr int64_t TILE_COPY_BYTES = TILE_COPIES * int64_t(sizeof(WeightTiles));
template <class T>
static inline int64_t tile_work_bytes(int64_t rows) {
    constexpr int64_t GROUPS = TILE_FEATURES_AT_ONCE<T> / GROUP<T>;
    return TILE_COPY_BYTES + GROUPS * tile_blocks(rows) * Parts<T>::COUNT * 2 * TILE * TILE * int64_t(sizeof(float));
}

// Assembly, as gcc 12 drops a loop of nothing but __builtin_prefetch. To the first-level cache, or to the second.
static inline void fetch(const char *p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
static inline void fetch_far(const char *p) { __asm__ volatile("prefetcht1 %0" : : "m"(*p)); }

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
    const T *at[TILE];
    for (int64_t i = 0; i < TILE; ++i) at[i] = (const T *)row_at(x, row + (i < count ? i : 0));
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t c = step * TILE_COLUMNS;
        const auto load_row = [&](__m512i(&part)[PARTS], int64_t i) {
            Parts<T>::load(part, at[i] + c, x.length - c);
            fetch((const char *)(at[i] + c) + 512);
        };
        const auto out_of = [&](int k) { return panel + (k * steps + step) * TILE_COLUMNS * width; };
        if (width == 1) { // one row in pairs is that row
            __m512i part[PARTS];
            load_row(part, 0);
            for (int k = 0; k < PARTS; ++k) _mm512_storeu_si512(out_of(k), part[k]);
            continue;
        }
        __m512i r[PARTS][16];
#pragma GCC unroll 16 // else the rows go through memory
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

// Copies 32 columns of a group of rows; where rows or columns are missing, there are zeros.
template <class T>
static inline void copy_weights(WeightTiles &to, const Rows &weight, int64_t n, int64_t count, int64_t c) {
    constexpr int PARTS = Parts<T>::COUNT;
    const char *row = weight.base + n * weight.step[0] + c * int64_t(sizeof(T));
    for (int64_t i = 0; i < GROUP<T>; ++i, row += weight.step[0]) {
        __m512i part[PARTS] = {};
        if (i < count) Parts<T>::load(part, (const T *)row, weight.length - c);
        for (int k = 0; k < PARTS; ++k) _mm512_store_si512(to.tile[PARTS == 1 ? i / TILE : k][i % TILE], part[k]);
    }
}

// Weights that are asked for beside the products of those before them, evenly, row after row as they lie in memory,
// which sees one stream of 4 KiB and more at a time: the best that was measured for reading. In step with the products
// it would be 32 streams, about as many as the processor follows by itself, and the requests of the first-level cache,
// 16 at a time, would have to wait for memory. (On Zen 5, which has no tiles, streams in step are 10 % faster.)
struct WeightsAhead {
    const char *row;
    int64_t step, bytes, at; // from row to row, of a row, in the row
    int64_t left, share;     // lines to ask for in all, and beside a step of products

    // The columns [begin, end) of the rows [n, n + rows), beside so many steps of products.
    WeightsAhead(const Rows &weight, int64_t n, int64_t rows, int64_t begin, int64_t end, int64_t size, int64_t beside)
        : row(weight.base + n * weight.step[0] + begin * size), step(weight.step[0]), bytes((end - begin) * size),
          at(0), left(rows * ((bytes + 63) / 64)), share((left + beside - 1) / (beside > 0 ? beside : 1)) {}
    void ask() {
        for (int64_t i = share; i > 0 && left > 0; --i, --left) {
            fetch_far(row + at);
            if ((at += 64) >= bytes) at = 0, row += step;
        }
    }
};

// A part of the product: a group of features from n on, `count` of them, times up to two blocks of x or parts of one,
// over the columns [begin, end).
struct TilePart {
    const LinearArgs &args;
    int64_t n, count, begin, end;
    WeightTiles *copies; // of the steps, in turn
    bool once, copy;     // are the weights read only here? Else, are the copies still to be made?
    const bf16 *x;       // the block of the panel, from column 0 on
    int64_t block, width;
    float *saved; // sums of [block of x][tile of weights]
    bool load;
    int64_t row, out_rows; // of out, which are written next
};

// The sums of one or two blocks of x and one or two tiles of weights.
template <class T, bool TWO, bool WIDE>
static inline void tile_product(const TilePart &p, WeightsAhead &ahead) {
    constexpr int64_t SIZE = TILE * TILE, STEP = TILE * int64_t(sizeof(float));
    const Rows &weight = p.args.weight;
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
    // Whole tiles of bf16 that are read once are read where they lie. Others are copied, as rows that lie a power of
    // two apart would share few sets of the cache; a step before it is needed, as a tile is not loaded from stores that
    // are still on their way, and beside the products of the first rows of x.
    const bool whole_rows = p.once && Parts<T>::COUNT == 1 && p.count >= (WIDE ? 2 : 1) * TILE;
    const auto in_place = [&](int64_t c) { return whole_rows && weight.length - c >= TILE_COLUMNS; };
    const auto copy_of = [&](int64_t c) -> WeightTiles & {
        return p.copies[(c - p.begin) / TILE_COLUMNS % TILE_COPIES];
    };
    const auto copy = [&](int64_t c) {
        if (p.copy && c < p.end && !in_place(c)) copy_weights<T>(copy_of(c), weight, p.n, p.count, c);
    };
    copy(p.begin);
    const int64_t steps = tile_steps(p.end - p.begin);
    for (int64_t i = 0; i < steps; ++i) {
        const int64_t c = p.begin + i * TILE_COLUMNS;
        copy(c + TILE_COLUMNS);
        const WeightTiles &own = copy_of(c);
        const char *a = (const char *)own.tile[0], *b = (const char *)own.tile[1];
        int64_t step = TILE_COLUMNS * int64_t(sizeof(bf16));
        if (in_place(c)) {
            step = weight.step[0];
            a = weight.base + p.n * step + c * int64_t(sizeof(bf16));
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
        ahead.ask();
        for (int64_t m = i; m < p.out_rows; m += steps) fetch(row_at(p.args.out, p.row + m) + p.n * int64_t(sizeof(T)));
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

// Calls `finish(sums, sums_row, row, rows, n, features)` with the sums of the blocks [first, last) of x and the
// features [begin, end), at most TILE_FEATURES_AT_ONCE, a block of rows and a group of features at a time.
template <class T, class Finish>
static inline void tile_sums(const LinearArgs &args, int64_t first, int64_t last, int64_t begin, int64_t end,
                             char *work, Finish finish) {
    constexpr int PARTS = Parts<T>::COUNT;
    constexpr int64_t SIZE = TILE * TILE, BYTES = int64_t(sizeof(T));
    const Rows &weight = args.weight;
    const int64_t width = block_rows(args.rows), block = panel_block(args.rows, weight.length);
    const int64_t columns = weight.length, blocks = (last - first) * PARTS, pairs = (blocks + 1) / 2;
    const int64_t groups = (end - begin + GROUP<T> - 1) / GROUP<T>;
    const auto *panel = (const bf16 *)args.panel + first * PARTS * block;
    auto *copies = (WeightTiles *)work;
    auto *saved = (float *)(work + TILE_COPY_BYTES); // [group][block of x][tile of weights]
    // Weights that are read once need no chunks.
    const bool once = pairs == 1;
    const int64_t piece = piece_columns(columns, blocks * width * int64_t(sizeof(bf16)));
    const int64_t chunk = once ? piece : even_columns(piece, TILE_CHUNK);
    const auto row_of = [&](int64_t m) { return block_row(args.rows, first + m); };
    configure_tiles(width);
    int64_t from = 0, until;
    do { // once at least, as without columns the sums are zero
        until = columns - from < piece ? columns : from + piece;
        const bool done = until == columns;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t n = begin + g * GROUP<T>, count = end - n < GROUP<T> ? end - n : GROUP<T>;
            const bool wide = PARTS > 1 || count > TILE;
            // What follows: this piece of the next group, or the next piece of the first one; or, behind the last
            // column, the features behind these.
            const bool more = g + 1 < groups;
            const int64_t after = more ? n + GROUP<T> : done ? end : begin, limit = done && !more ? weight.count : end;
            const int64_t start = more ? from : done ? 0 : until;
            WeightsAhead ahead(weight, after, limit - after < GROUP<T> ? limit - after : GROUP<T>, start,
                               columns - start < piece ? columns : start + piece, BYTES,
                               pairs * tile_steps(until - from));
            int64_t c = from, stop;
            do {
                stop = until - c < chunk ? until : c + chunk;
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    const int64_t m = 2 * pair, row = row_of(m / PARTS);
                    const int64_t below = blocks - m > 2 ? row_of((m + 2) / PARTS) : row_of(last - first);
                    const TilePart part{args,
                                        n,
                                        count,
                                        c,
                                        stop,
                                        copies,
                                        once,
                                        pair == 0,
                                        panel + m * block,
                                        block,
                                        width,
                                        saved + (g * blocks + m) * 2 * SIZE,
                                        c > 0,
                                        args.row + row,
                                        stop == columns && blocks >= OUT_AHEAD ? below - row : 0};
                    if (blocks - m > 1)
                        wide ? tile_product<T, true, true>(part, ahead) : tile_product<T, true, false>(part, ahead);
                    else
                        wide ? tile_product<T, false, true>(part, ahead) : tile_product<T, false, false>(part, ahead);
                }
                c = stop;
            } while (c < until);
            for (int64_t m = 0; done && m < last - first; ++m) {
                const int64_t row = row_of(m), rows_of_block = row_of(m + 1) - row;
                float *tiles = saved + (g * blocks + m * PARTS) * 2 * SIZE;
                alignas(64) float sums[TILE * GROUP<T>];
                if constexpr (PARTS > 1) add_parts(tiles);
                for (int64_t at = 0; at < count; at += TILE)
                    turn_tile(sums + at, GROUP<T>, tiles + at / TILE * SIZE, rows_of_block, count - at);
                finish(sums, GROUP<T>, row, rows_of_block, n, count);
            }
        }
        from = until;
    } while (from < columns);
    tile_release();
}

} // namespace llaisys::LLAISYS_TIER
