// Opaque handles. What C holds is no pointer but the number of a slot, the slot's generation and the kind of object, so
// that a handle that was freed, of another kind, or that never was one, is an error and not a crash.
#pragma once

#include "status.h"

#include <memory>
#include <mutex>
#include <vector>

namespace llaisys {

template <class Object>
class Handles {
public:
    // `tag` tells the kinds apart: a number below 4, of its own for each.
    Handles(const char *kind, uintptr_t tag) : kind_(kind), tag_(tag) {}

    uintptr_t add(std::shared_ptr<Object> object) {
        const std::lock_guard lock(mutex_);
        size_t i = 0;
        while (i < slots_.size() && slots_[i].object) ++i;
        if (i == size_t(1) << INDEX_BITS)
            fail(LLAISYS_ERROR_OUT_OF_MEMORY, "expected at most %zu handles of a %s at a time", i, kind_);
        if (i == slots_.size()) slots_.emplace_back();
        slots_[i].object = std::move(object);
        return key(i);
    }

    std::shared_ptr<Object> get(const void *handle) {
        const std::lock_guard lock(mutex_);
        return slots_[find(handle)].object;
    }

    std::shared_ptr<Object> remove(const void *handle) {
        const std::lock_guard lock(mutex_);
        Slot &slot = slots_[find(handle)];
        ++slot.generation;
        return std::move(slot.object);
    }

private:
    struct Slot {
        std::shared_ptr<Object> object;
        uintptr_t generation = 1;
    };

    // Odd, so that no pointer to an object is taken for a handle.
    static constexpr int INDEX_BITS = 16;
    uintptr_t key(size_t i) const { return (slots_[i].generation << INDEX_BITS | i) << 3 | tag_ << 1 | 1; }

    size_t find(const void *handle) const {
        const auto value = reinterpret_cast<uintptr_t>(handle);
        const size_t i = value >> 3 & ((size_t(1) << INDEX_BITS) - 1);
        if (i >= slots_.size() || !slots_[i].object || key(i) != value)
            fail(LLAISYS_ERROR_HANDLE, "expected a %s, found %s", kind_,
                 handle ? "a handle that was freed or never was one" : "NULL");
        return i;
    }

    const char *kind_;
    uintptr_t tag_;
    std::mutex mutex_;
    std::vector<Slot> slots_;
};

} // namespace llaisys
