// A number in f16 as the sum of two in bf16, for the products of AMX tiles: the high part is the number cut off after
// 8 bits, the low one the other 3. Both are exact, and never subnormal, as 2^-24 is the smallest.
#pragma once

#include "core/tier.h"

#include <immintrin.h>

namespace llaisys::LLAISYS_TIER {

static inline __mmask16 finite_mask(Vec x) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x.v), set1(__builtin_inff()).v, _CMP_LT_OQ);
}

// Each part in the upper half of a lane, the high one as bits. Of an infinity or a NaN the low part is NaN.
struct F16Parts {
    __m512i high;
    Vec low;
};
static inline F16Parts parts_of(Vec x) {
    const __m512i high = _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(int(0xffff0000)));
    return {high, x - Vec{_mm512_castsi512_ps(high)}};
}
// Lanes of both, a below b.
static inline __m512i paired(__m512i a, __m512i b) {
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(a, 16), 0xaaaaaaaa, b);
}

} // namespace llaisys::LLAISYS_TIER
