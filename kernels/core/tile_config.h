// How the eight tile registers are shaped: what amx.h, and its emulation in tests/amx_emulation, configure them with.
#pragma once

#include <stdint.h>

namespace llaisys::LLAISYS_TIER {

// The operand of ldtilecfg: rows and bytes a row of each tile.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
// All of them whole: 16 rows of 64 bytes.
static inline TileConfig whole_tiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    return config;
}

} // namespace llaisys::LLAISYS_TIER
