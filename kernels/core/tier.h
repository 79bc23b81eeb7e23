// The first include of a kernel: the names and the vector type of the tier it is being compiled for.
//
// meson.build compiles every file of kernels/ops once per tier, with the tier's compiler flags and
//   -DLLAISYS_TIER=scalar|avx2|avx512|amx   the namespace that the kernels of this pass live in
//   -DLLAISYS_ONCE                          in one of the passes only: that one also compiles the C entry
// Everything that a kernel uses must live in that namespace or be static, and the standard library stays out: an inline
// function that two tiers share is one symbol, and the linker might keep the copy compiled with AVX-512.
// tests/test_library.py checks the objects for that.
#pragma once

#include "../llaisys.h"
#include "dtype.h"
#include "rows.h"

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif
#include "vec_math.h"

namespace llaisys::LLAISYS_TIER {

// The element type of `dtype`, which is one of the three (the C entry has seen to that), as an argument for `call`.
template <class Call>
static inline void with_type(int32_t dtype, Call call) {
    if (dtype == LLAISYS_DTYPE_F32)
        call(float());
    else if (dtype == LLAISYS_DTYPE_F16)
        call(f16());
    else
        call(bf16());
}

} // namespace llaisys::LLAISYS_TIER
