#include "cpu.h"

#include "status.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llaisys {

namespace {

constexpr const char *tier_names[TIERS] = {"scalar", "avx2", "avx512", "amx"};

int tier_by_name(const char *name) {
    for (int t = 0; t < TIERS; ++t)
        if (name && std::strcmp(name, tier_names[t]) == 0) return t;
    return -1;
}

#if defined(__x86_64__)

// CPUID tells what the processor has, XCR0 which registers the operating system saves.
uint64_t xcr0() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool detect_avx512_bf16() {
    uint32_t a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Kernels of the amx tier use AVX512_BF16 beside the tiles; no processor has these without it.
int detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return SCALAR;
    const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!(osxsave && avx && fma && f16c) || (xcr0() & 0x6) != 0x6) return SCALAR;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return SCALAR;
    const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
    if (!(f && dq && bw && vl) || (xcr0() & 0xe6) != 0xe6) return AVX2;
    return detect_avx512_bf16() && may_use_tiles() ? AMX : AVX512;
}

#else
int detect() { return SCALAR; }
bool detect_avx512_bf16() { return false; }
#endif

int best_tier() {
    static const int tier = detect();
    return tier;
}

constexpr int UNSET = -1, REFUSED = -2;
std::atomic<int> active{UNSET};

const char *wanted_tier() {
    const char *name = std::getenv("LLAISYS_ISA");
    return name && *name ? name : nullptr;
}

int initial_tier() {
    const char *name = wanted_tier();
    if (!name) return best_tier();
    const int tier = tier_by_name(name);
    return tier >= 0 && tier <= best_tier() ? tier : REFUSED;
}

int load_active() {
    int tier = active.load(std::memory_order_relaxed);
    if (tier == UNSET) {
        const int initial = initial_tier();
        // Another thread may have been first, or may have called llaisysSetIsa: then that stands.
        if (active.compare_exchange_strong(tier, initial)) tier = initial;
    }
    return tier;
}

} // namespace

Tier active_tier() {
    const int tier = load_active();
    if (tier == REFUSED) {
        const char *name = wanted_tier();
        fail(tier_by_name(name) < 0 ? LLAISYS_ERROR_INVALID_ARGUMENT : LLAISYS_ERROR_UNSUPPORTED,
             "LLAISYS_ISA: expected scalar, avx2, avx512 or amx, of which this machine's best is %s, found %.40s",
             tier_names[best_tier()], name ? name : "nothing");
    }
    return Tier(tier);
}

bool has_tier(Tier tier) { return tier <= best_tier(); }

bool has_avx512_bf16() {
    static const bool there = has_tier(AVX512) && detect_avx512_bf16();
    return there;
}

} // namespace llaisys

extern "C" {

int32_t llaisysSetIsa(const char *name) {
    return llaisys::guarded("set_isa", [&] {
        const int tier = llaisys::tier_by_name(name);
        if (tier < 0)
            llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "expected scalar, avx2, avx512 or amx, found %s",
                          name ? name : "NULL");
        if (tier > llaisys::best_tier())
            llaisys::fail(LLAISYS_ERROR_UNSUPPORTED, "this machine has no %s; its best tier is %s", name,
                          llaisys::tier_names[llaisys::best_tier()]);
        llaisys::active.store(tier);
    });
}

const char *llaisysIsa(void) {
    const char *name = nullptr;
    llaisys::guarded("isa", [&] { name = llaisys::tier_names[llaisys::active_tier()]; });
    return name;
}

int32_t llaisysHasIsa(const char *name) {
    const int tier = llaisys::tier_by_name(name);
    if (tier < 0)
        return llaisys::set_error("has_isa", LLAISYS_ERROR_INVALID_ARGUMENT, "expected scalar, avx2, avx512 or amx");
    return llaisys::has_tier(llaisys::Tier(tier));
}
}
