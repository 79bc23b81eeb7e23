// Element types as plain data. No functions here: this header is compiled once per tier, with other flags each time,
// and an inline function would be one symbol for all of them.
#pragma once

#include <stdint.h>

namespace llaisys {

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

} // namespace llaisys
