// Whether the process may use tiles. A file of its own, as tests/amx_emulation.cpp has another answer.
#include "cpu.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace llaisys {

bool may_use_tiles() {
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool amx_bf16 = d >> 22 & 1, amx_tile = d >> 24 & 1;
    if (!(amx_bf16 && amx_tile)) return false;
    uint32_t low, high; // XCR0 tells which registers the operating system saves
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x60000) != 0x60000) return false;
    // Linux hands out the 8 KiB of tile state on request only, for the whole process and all threads it starts later.
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

} // namespace llaisys
#else
bool llaisys::may_use_tiles() { return false; }
#endif
