// Status codes and the thread-local text of the last error; how every C entry turns a failure into them.
#pragma once

#include "../llaisys.h"

#include <new>
#include <string>

namespace llaisys {

// Thrown inside the library, never across its boundary.
struct Failure {
    int32_t status;
    std::string text;
};

[[noreturn]] void fail(int32_t status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Remembers `text` as the last error of this thread, prefixed with the name of the call, and returns `status`.
int32_t set_error(const char *call, int32_t status, const char *text) noexcept;

// Runs `body` and turns what it throws into a status. `call` is the name that the error text starts with.
template <class Body>
int32_t guarded(const char *call, Body &&body) noexcept {
    try {
        body();
        return LLAISYS_OK;
    } catch (const Failure &f) {
        return set_error(call, f.status, f.text.c_str());
    } catch (const std::bad_alloc &) {
        return set_error(call, LLAISYS_ERROR_OUT_OF_MEMORY, "out of memory");
    } catch (const std::exception &e) {
        return set_error(call, LLAISYS_ERROR_INTERNAL, e.what());
    } catch (...) {
        return set_error(call, LLAISYS_ERROR_INTERNAL, "unknown exception");
    }
}

} // namespace llaisys
