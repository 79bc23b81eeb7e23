// Layers that read the same x, for the models: computed as one, of which x is packed once and the features of all are
// shared out together. Each has the bits that llaisysLinear gives it.
#pragma once

#include "llaisys.h"

#include <initializer_list>

namespace llaisys {

struct LinearLayer {
    LlaisysTensor *out;
    const LlaisysTensor *weight, *bias; // bias NULL or of the weight's rows
};
constexpr size_t LINEAR_LAYERS = 3; // at most

// As llaisysLinear returns. The outputs must not overlap.
int32_t linear_layers(const LlaisysTensor *x, std::initializer_list<LinearLayer> layers);

} // namespace llaisys
