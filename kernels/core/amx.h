// The eight tile registers, as functions: each takes its registers as template arguments, as the instructions do.
// On processors without them, tests/amx_emulation.cpp does what these instructions would.
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

// Assembly throughout: gcc 12's intrinsics want the registers as literals, and its _tile_loadconfig is taken to read
// fewer bytes than it does, so that stores to the others are dropped.
static inline void tile_configure(const TileConfig &config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
static inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int TILE>
static inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(TILE));
}
// Rows that are `step` bytes apart.
template <int TILE>
static inline void tile_load(const void *from, int64_t step) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(step) : "memory");
}
template <int TILE>
static inline void tile_store(void *to, int64_t step) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(to), "r"(step) : "memory");
}
// SUM[m][n] += A[m] . B[n]: A has pairs of bf16 numbers in its rows, B pair k of all n in row k.
template <int SUM, int A, int B>
static inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

} // namespace llaisys::LLAISYS_TIER
