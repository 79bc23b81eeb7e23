// What kernels/core/amx.h promises, computed in a thread's memory: for builds with -Damx=emulated, to test the amx tier
// on processors without tiles. The arithmetic is that of TDPBF16PS: subnormal operands count as zero, subnormal results
// become zero, products of even and of odd columns are added up apart, each with one rounding.
#pragma once

#include "core/tile_config.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace llaisys::LLAISYS_TIER {

struct EmulatedTiles {
    TileConfig config;
    bool configured = false;
    unsigned char tile[8][16][64];
};
static inline EmulatedTiles &emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}
// The processor would raise an exception, which ends the process.
static inline void tile_require(bool met, const char *what) {
    if (met) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
}

static inline void tile_configure(const TileConfig &config) {
    EmulatedTiles &t = emulated_tiles();
    for (int i = 0; i < 16; ++i) {
        tile_require(config.rows[i] <= (i < 8 ? 16 : 0) && config.row_bytes[i] <= (i < 8 ? 64 : 0), "rows or bytes");
        tile_require((config.rows[i] == 0) == (config.row_bytes[i] == 0), "rows without bytes");
    }
    tile_require(config.palette == 1 && config.start_row == 0, "palette");
    t.config = config;
    t.configured = true;
    memset(t.tile, 0, sizeof t.tile);
}
static inline void tile_release() { emulated_tiles().configured = false; }

template <int TILE>
static inline EmulatedTiles &tile_checked() {
    EmulatedTiles &t = emulated_tiles();
    tile_require(t.configured && t.config.rows[TILE] > 0, "a tile that is not configured");
    return t;
}
template <int TILE>
static inline void tile_zero() {
    memset(tile_checked<TILE>().tile[TILE], 0, sizeof(EmulatedTiles::tile[TILE]));
}
template <int TILE>
static inline void tile_load(const void *from, int64_t step) {
    EmulatedTiles &t = tile_checked<TILE>();
    memset(t.tile[TILE], 0, sizeof t.tile[TILE]);
    for (int i = 0; i < t.config.rows[TILE]; ++i)
        memcpy(t.tile[TILE][i], (const char *)from + i * step, t.config.row_bytes[TILE]);
}
template <int TILE>
static inline void tile_store(void *to, int64_t step) {
    EmulatedTiles &t = tile_checked<TILE>();
    for (int i = 0; i < t.config.rows[TILE]; ++i)
        memcpy((char *)to + i * step, t.tile[TILE][i], t.config.row_bytes[TILE]);
}

static inline float tile_flush(float x) { return x == 0 || fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
static inline float tile_bf16(const unsigned char *at) {
    uint16_t bits;
    memcpy(&bits, at, sizeof bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return tile_flush(x);
}

template <int SUM, int A, int B>
static inline void tile_dot() {
    EmulatedTiles &t = tile_checked<SUM>();
    tile_checked<A>();
    tile_checked<B>();
    const TileConfig &c = t.config;
    tile_require(c.rows[SUM] == c.rows[A] && c.row_bytes[SUM] == c.row_bytes[B] && c.row_bytes[A] == 4 * c.rows[B],
                 "tiles that do not fit");
    for (int m = 0; m < c.rows[SUM]; ++m)
        for (int n = 0; n < c.row_bytes[SUM] / 4; ++n) {
            float even = 0.0f, odd = 0.0f, sum;
            for (int k = 0; k < c.rows[B]; ++k) {
                const unsigned char *a = t.tile[A][m] + 4 * k, *b = t.tile[B][k] + 4 * n;
                even = tile_flush(fmaf(tile_bf16(a), tile_bf16(b), even));
                odd = tile_flush(fmaf(tile_bf16(a + 2), tile_bf16(b + 2), odd));
            }
            memcpy(&sum, t.tile[SUM][m] + 4 * n, sizeof sum);
            sum = tile_flush(tile_flush(sum) + tile_flush(even + odd));
            memcpy(t.tile[SUM][m] + 4 * n, &sum, sizeof sum);
        }
}

} // namespace llaisys::LLAISYS_TIER
