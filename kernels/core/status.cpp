#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace llaisys {

namespace {
// A fixed buffer: reporting that memory has run out must not need memory.
thread_local char last_error[1024] = "";
thread_local int32_t last_status = LLAISYS_OK;
} // namespace

void fail(int32_t status, const char *format, ...) {
    char text[768];
    va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    throw Failure{status, text};
}

int32_t set_error(const char *call, int32_t status, const char *text) noexcept {
    last_status = status;
    std::snprintf(last_error, sizeof last_error, "%s: %s", call, text);
    return status;
}

} // namespace llaisys

extern "C" {

int32_t llaisysAbiVersion(void) { return LLAISYS_ABI_VERSION; }
const char *llaisysVersion(void) { return LLAISYS_VERSION; }
const char *llaisysLastError(void) { return llaisys::last_error; }
int32_t llaisysLastStatus(void) { return llaisys::last_status; }

const char *llaisysStatusName(int32_t status) {
    switch (status) {
    case LLAISYS_OK: return "OK";
    case LLAISYS_ERROR_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case LLAISYS_ERROR_SHAPE: return "SHAPE";
    case LLAISYS_ERROR_DTYPE: return "DTYPE";
    case LLAISYS_ERROR_STRIDE: return "STRIDE";
    case LLAISYS_ERROR_ALIAS: return "ALIAS";
    case LLAISYS_ERROR_INDEX: return "INDEX";
    case LLAISYS_ERROR_HANDLE: return "HANDLE";
    case LLAISYS_ERROR_STATE: return "STATE";
    case LLAISYS_ERROR_OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case LLAISYS_ERROR_UNSUPPORTED: return "UNSUPPORTED";
    case LLAISYS_ERROR_INTERRUPTED: return "INTERRUPTED";
    case LLAISYS_ERROR_INTERNAL: return "INTERNAL";
    default: return "UNKNOWN";
    }
}
}
