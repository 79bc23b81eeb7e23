// Which instruction set tiers the machine and the build have, which one is in use, and the dispatch to its kernels.
#pragma once

#include <stdint.h>

namespace llaisys {

enum Tier : int { SCALAR, AVX2, AVX512, AMX, TIERS };

// The tier that operators run in now. Throws Failure if LLAISYS_ISA asks for what can not be had.
Tier active_tier();

// Whether the machine and the build have the tier, in use or not.
bool has_tier(Tier tier);
// Whether processor and operating system let this process use AMX tiles.
bool may_use_tiles();

// Whether the processor has AVX512_BF16, which is no tier of its own: the avx512 tier uses it where it is there.
bool has_avx512_bf16();

// One kernel in every tier it was compiled for; nullptr where it was not.
template <class Fn>
struct Kernel {
    constexpr Kernel(Fn *scalar, Fn *avx2, Fn *avx512, Fn *amx, Fn *avx512bf16 = nullptr)
        : tier{scalar, avx2, avx512, amx}, bf16(avx512bf16) {}
    Fn *tier[TIERS];
    Fn *bf16; // that of the avx512 tier, with AVX512_BF16
    // The kernel of a tier, or of the best one below it. Who needs several reads the tier once: it may change
    // meanwhile.
    Fn *get(Tier of = active_tier()) const {
        int t = of;
        while (!tier[t]) --t;
        return t == AVX512 && bf16 && has_avx512_bf16() ? bf16 : tier[t];
    }
};

} // namespace llaisys

// Declares `name` in the namespaces of the tiers and gathers them as `name_kernel`. Each operator is compiled once per
// tier (see meson.build), so that only this declaration has to know of all of them. LLAISYS_KERNEL_BF16 is for those
// few that have a kernel of their own for tiles and one for AVX512_BF16; in the others the amx tier uses the avx512
// kernel.
#if defined(__x86_64__)
#define LLAISYS_KERNEL(name, Fn)                                                                                       \
    namespace avx2 { Fn name; }                                                                                        \
    namespace avx512 { Fn name; }                                                                                      \
    static constexpr Kernel<Fn> name##_kernel(scalar::name, avx2::name, avx512::name, nullptr)
#define LLAISYS_KERNEL_BF16(name, Fn)                                                                                  \
    namespace avx2 { Fn name; }                                                                                        \
    namespace avx512 { Fn name; }                                                                                      \
    namespace avx512bf16 { Fn name; }                                                                                  \
    namespace amx { Fn name; }                                                                                         \
    static constexpr Kernel<Fn> name##_kernel(scalar::name, avx2::name, avx512::name, amx::name, avx512bf16::name)
#else
#define LLAISYS_KERNEL(name, Fn) static constexpr Kernel<Fn> name##_kernel(scalar::name, nullptr, nullptr, nullptr)
#define LLAISYS_KERNEL_BF16(name, Fn) LLAISYS_KERNEL(name, Fn)
#endif
