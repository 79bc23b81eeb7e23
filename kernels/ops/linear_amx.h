// linear in bf16 on AMX tiles.
//
// A tile product adds, for 16 rows of the weights and up to 16 rows of x, 32 columns to a tile of f32 sums, pair of
// columns after pair. The weights are the first operand, read row by row as they lie in the checkpoint; x is the
// second, packed once into pairs of columns: [block of 16 rows][pair of columns][row]. The sums stay in one tile over
// all columns, so an element has one order of accumulation, whatever is computed beside it. The processor takes
// subnormal bf16 numbers for zero in these products and flushes subnormal sums; the bound of the SPEC says so.
#pragma once

#include "core/tier.h"

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

constexpr int64_t TILE = 16;         // rows of a tile
constexpr int64_t TILE_COLUMNS = 32; // bf16 columns of a tile

static inline int64_t tile_steps(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
// Rows of x in a block of the panel: all of a few rows, else 16.
static inline int64_t block_rows(int64_t rows) { return rows < TILE ? rows : TILE; }
// bf16 elements of the panel of `rows` rows, and of one block of it.
static inline int64_t panel_block(int64_t rows, int64_t columns) {
    return tile_steps(columns) * TILE_COLUMNS * block_rows(rows);
}
static inline int64_t tile_panel_bytes(int64_t rows, int64_t columns) {
    return (rows + TILE - 1) / TILE * panel_block(rows, columns) * int64_t(sizeof(bf16));
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

// The operand of ldtilecfg. gcc 12 takes _tile_loadconfig to read fewer bytes than it does and drops stores to the
// others, hence the assembly with all 64 bytes as its operand.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
// Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 x, of which `width` rows lie in a block.
static inline void configure_tiles(int64_t width) {
    TileConfig config;
    for (int i = 0; i < 8; ++i) {
        config.rows[i] = TILE;
        config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * width);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

// 16 rows of the weights as a tile operand: where they lie, or, where rows or columns are missing, as a copy filled up
// with zeros, so that nothing outside the tensor is read.
struct WeightTile {
    const char *at;
    int64_t step;
};
static inline WeightTile weight_tile(bf16 (&copy)[TILE][TILE_COLUMNS], const Rows &weight, int64_t n, int64_t count,
                                     int64_t c) {
    const int64_t left = weight.length - c;
    const char *at = row_at(weight, n) + c * int64_t(sizeof(bf16));
    if (count >= TILE && left >= TILE_COLUMNS) return {at, weight.step[0]};
    const __mmask32 mask = left < TILE_COLUMNS ? (1u << left) - 1 : ~0u;
    for (int64_t i = 0; i < TILE; ++i)
        _mm512_storeu_si512(copy[i],
                            i < count ? _mm512_maskz_loadu_epi16(mask, at + i * weight.step[0])
                                      : _mm512_setzero_si512());
    return {(const char *)copy, sizeof copy[0]};
}

// sums[m, n] of two blocks of x (or one, where `two` is false) and 32 rows of the weights from n on, `count` of which
// exist.
template <bool two>
static inline void tile_product(float *sums, int64_t sums_row, const Rows &weight, int64_t n, int64_t count,
                                const bf16 *x, int64_t block, int64_t width) {
    alignas(64) bf16 copy[2][TILE][TILE_COLUMNS];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < weight.length; c += TILE_COLUMNS) {
        const WeightTile a = weight_tile(copy[0], weight, n, count, c);
        _tile_loadd(4, a.at, a.step);
        _tile_loadd(6, x + c * width, width * 4);
        if (two) _tile_loadd(7, x + block + c * width, width * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (two) _tile_dpbf16ps(1, 4, 7);
        if (count > TILE) {
            const WeightTile b = weight_tile(copy[1], weight, n + TILE, count - TILE, c);
            _tile_loadd(5, b.at, b.step);
            _tile_dpbf16ps(2, 5, 6);
            if (two) _tile_dpbf16ps(3, 5, 7);
        }
    }
    // A tile of sums is [n, m]: it is turned on its way out.
    alignas(64) float tile[TILE][TILE];
    const auto turn = [&](int64_t m, int64_t first) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_load_si512(tile[i]);
        transpose(r);
        const int64_t features = count - first < TILE ? count - first : TILE;
        for (int64_t i = 0; i < width; ++i)
            _mm512_mask_storeu_epi32(sums + (m + i) * sums_row + first, __mmask16((1u << features) - 1), r[i]);
    };
    _tile_stored(0, tile, sizeof tile[0]);
    turn(0, 0);
    if (two) {
        _tile_stored(1, tile, sizeof tile[0]);
        turn(TILE, 0);
    }
    if (count > TILE) {
        _tile_stored(2, tile, sizeof tile[0]);
        turn(0, TILE);
        if (two) {
            _tile_stored(3, tile, sizeof tile[0]);
            turn(TILE, TILE);
        }
    }
}

// The sums of `rows` rows of the panel and the features [begin, end) of the weights.
static inline void tile_sums(float *sums, int64_t sums_row, const Rows &weight, const bf16 *panel, int64_t rows,
                             int64_t begin, int64_t end) {
    const int64_t width = block_rows(rows), block = panel_block(rows, weight.length);
    configure_tiles(width);
    for (int64_t n = begin; n < end; n += 2 * TILE) {
        const int64_t count = end - n < 2 * TILE ? end - n : 2 * TILE;
        for (int64_t m = 0; m < rows; m += 2 * TILE) {
            float *out = sums + m * sums_row + (n - begin);
            const bf16 *x = panel + m / TILE * block;
            if (rows - m > TILE)
                tile_product<true>(out, sums_row, weight, n, count, x, block, width);
            else
                tile_product<false>(out, sums_row, weight, n, count, x, block, width);
        }
    }
    _tile_release();
}

} // namespace llaisys::LLAISYS_TIER
