#pragma once

#include <cstdint>

namespace llaisys {

// Copies `count` contiguous elements between f32, f16 and bf16 (LlaisysDataType), rounding to nearest even.
void convert_elements(void *out, int32_t out_dtype, const void *x, int32_t x_dtype, int64_t count);
// The same on the calling thread alone, for callers that are many.
void convert_elements_alone(void *out, int32_t out_dtype, const void *x, int32_t x_dtype, int64_t count);

} // namespace llaisys
