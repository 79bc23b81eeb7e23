// Tiles for processors that have none: in builds with -Damx=emulated it stands in for kernels/core/amx.cpp. The kernels
// are those of every build. Each of their tile instructions is an illegal one here, whose signal this file answers: it
// decodes the instruction, computes what it would have done and goes on behind it. So the tests run the instructions as
// they were assembled, and what the processor refuses (a tile without a configuration, tiles that do not fit, another
// thread's configuration) ends the process here too.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, instructions LDTILECFG to TILEZERO.
#include "core/cpu.h"

#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

constexpr int TILES = 8, ROWS = 16, ROW_BYTES = 64;

// In a handler of a signal: only what is safe there.
[[noreturn]] void refuse(const char *what) {
    char text[160];
    const int length = snprintf(text, sizeof text, "emulated tiles: %s\n", what);
    if (write(STDERR_FILENO, text, size_t(length)) < 0) _exit(1);
    abort();
}
void require(bool met, const char *what) {
    if (!met) refuse(what);
}

// What a thread has: until LDTILECFG, and after TILERELEASE, no tile has any rows. Kernels leave none configured: the
// system would save 8 KiB more whenever it changes threads.
struct Tiles {
    int rows[TILES], row_bytes[TILES];
    alignas(64) uint8_t tile[TILES][ROWS][ROW_BYTES];
    ~Tiles() {
        for (int i : rows) require(i == 0, "a thread that ends with tiles");
    }
};
thread_local Tiles tiles;
void release() {
    memset(tiles.rows, 0, sizeof tiles.rows);
    memset(tiles.row_bytes, 0, sizeof tiles.row_bytes);
}

// The operand of LDTILECFG: palette, first row, 14 bytes of zero, bytes a row of 16 tiles, rows of 16 tiles.
void configure(const uint8_t *from) {
    release();
    memset(tiles.tile, 0, sizeof tiles.tile);
    if (from[0] == 0) return;
    require(from[0] == 1, "a palette other than 0 and 1");
    for (int i = 1; i < 16; ++i) require(from[i] == 0, "a first row, or a reserved byte");
    for (int i = 0; i < 16; ++i) {
        uint16_t row_bytes;
        memcpy(&row_bytes, from + 16 + 2 * i, sizeof row_bytes);
        const int rows = from[48 + i];
        require(i < TILES ? rows <= ROWS && row_bytes <= ROW_BYTES : rows == 0 && row_bytes == 0, "too large a tile");
        require((rows == 0) == (row_bytes == 0), "rows without bytes, or bytes without rows");
        if (i < TILES) tiles.rows[i] = rows, tiles.row_bytes[i] = row_bytes;
    }
}

// Copies a tile's rows from or to memory where they are `step` bytes apart.
void load(int tile, const uint8_t *from, int64_t step) {
    memset(tiles.tile[tile], 0, sizeof tiles.tile[tile]);
    for (int i = 0; i < tiles.rows[tile]; ++i)
        memcpy(tiles.tile[tile][i], from + i * step, size_t(tiles.row_bytes[tile]));
}
void store(int tile, uint8_t *to, int64_t step) {
    for (int i = 0; i < tiles.rows[tile]; ++i)
        memcpy(to + i * step, tiles.tile[tile][i], size_t(tiles.row_bytes[tile]));
}

// Subnormal numbers count as zero, as operands and as results.
float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
float bf16_at(const uint8_t *at) {
    uint32_t bits = uint32_t(at[0]) << 16 | uint32_t(at[1]) << 24;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
}
// TDPBF16PS: the products of the first and of the second numbers of the pairs are added up apart, each with one
// rounding, before they are added to each other and to the sum.
__attribute__((target("avx512f"))) void dot(int sum, int a, int b) {
    const Tiles &t = tiles;
    require(sum != a && sum != b && a != b, "a product of a tile with itself");
    require(t.rows[sum] == t.rows[a] && t.row_bytes[sum] == t.row_bytes[b] && t.row_bytes[a] == 4 * t.rows[b],
            "a product of tiles that do not fit");
    require(t.row_bytes[sum] % 4 == 0, "a product of tiles with parts of pairs");
    for (int m = 0; m < t.rows[sum]; ++m) {
        const int count = t.row_bytes[sum] / 4;
        float first[ROWS] = {}, second[ROWS] = {}, sums[ROWS];
        for (int k = 0; k < t.rows[b]; ++k) {
            const uint8_t *pair = t.tile[a][m] + 4 * k;
            const float left = bf16_at(pair), right = bf16_at(pair + 2);
            for (int n = 0; n < count; ++n) {
                first[n] = flushed(fmaf(left, bf16_at(t.tile[b][k] + 4 * n), first[n]));
                second[n] = flushed(fmaf(right, bf16_at(t.tile[b][k] + 4 * n + 2), second[n]));
            }
        }
        memcpy(sums, t.tile[sum][m], sizeof sums);
        for (int n = 0; n < count; ++n) sums[n] = flushed(flushed(sums[n]) + flushed(first[n] + second[n]));
        memcpy(tiles.tile[sum][m], sums, size_t(4 * count));
    }
}

// The numbers that instructions give to registers, in the order of the signal's context.
greg_t register_of(const ucontext_t *context, int number) {
    constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[order[number]];
}

// Does what the instruction at rip says and returns its length, or 0 where it is none of tiles.
int emulate(const ucontext_t *context, const uint8_t *code) {
    // VEX in three bytes: C4, inverted R X B and the map, W with inverted vvvv, L and the prefix.
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;
    const int extend_reg = code[1] & 0x80 ? 0 : 8, extend_index = code[1] & 0x40 ? 0 : 8;
    const int extend_base = code[1] & 0x20 ? 0 : 8, third = ~(code[2] >> 3) & 15, prefix = code[2] & 3;
    const int opcode = code[3], mod = code[4] >> 6, reg = (code[4] >> 3 & 7) | extend_reg, rm = code[4] & 7;
    constexpr int NONE = 0, P66 = 1, PF3 = 2, PF2 = 3;
    if (opcode != 0x5c && third != 0) return 0;
    const auto tile_of = [&](int tile) {
        require(tile < TILES && tiles.rows[tile] > 0, "a tile that is not configured");
        return tile;
    };

    if (mod == 3) {
        if (opcode == 0x49 && prefix == NONE && code[4] == 0xc0) {
            release(); // TILERELEASE
        } else if (opcode == 0x49 && prefix == PF2 && rm == 0) {
            memset(tiles.tile[tile_of(reg)], 0, sizeof tiles.tile[0]); // TILEZERO
        } else if (opcode == 0x5c && prefix == PF3) {
            dot(tile_of(reg), tile_of(rm | extend_base), tile_of(third)); // TDPBF16PS
        } else {
            return 0;
        }
        return 5;
    }

    // An operand in memory: base + index * scale + displacement.
    int length = 5, base = rm | extend_base;
    int64_t index = 0;
    if (rm == 4) {
        const uint8_t sib = code[length++];
        const int number = (sib >> 3 & 7) | extend_index;
        base = (sib & 7) | extend_base;
        if (number != 4) index = int64_t(uint64_t(register_of(context, number)) << (sib >> 6));
    }
    const bool no_base = mod == 0 && (base & 7) == 5;
    int64_t address = no_base ? 0 : register_of(context, base);
    if (mod == 1) {
        address += int8_t(code[length++]);
    } else if (mod == 2 || no_base) {
        int32_t displacement;
        memcpy(&displacement, code + length, sizeof displacement);
        length += 4;
        address += displacement;
        if (no_base && rm != 4) address += int64_t(code) + length; // relative to the next instruction
    }
    if (opcode == 0x49 && prefix == NONE && reg == 0) {
        configure((const uint8_t *)(address + index)); // LDTILECFG
    } else if (opcode == 0x4b && rm == 4 && (prefix == PF2 || prefix == P66)) {
        load(tile_of(reg), (const uint8_t *)address, index); // TILELOADD, TILELOADDT1
    } else if (opcode == 0x4b && rm == 4 && prefix == PF3) {
        store(tile_of(reg), (uint8_t *)address, index); // TILESTORED
    } else {
        return 0;
    }
    return length;
}

void on_illegal(int, siginfo_t *, void *state) {
    auto *context = (ucontext_t *)state;
    greg_t &rip = context->uc_mcontext.gregs[REG_RIP];
    int length = emulate(context, (const uint8_t *)rip);
    if (length == 0) refuse("an illegal instruction that is none of tiles");
    // Instructions in a row cost one signal, which is dearer than they are.
    for (; length > 0; length = emulate(context, (const uint8_t *)rip)) rip += length;
}

} // namespace

bool llaisys::may_use_tiles() {
    struct sigaction action = {};
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGILL, &action, nullptr) == 0;
}
