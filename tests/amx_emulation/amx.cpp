// Instead of kernels/core/amx.cpp in builds with -Damx=emulated: there are always tiles.
#include "core/cpu.h"

bool llaisys::may_use_tiles() { return true; }
