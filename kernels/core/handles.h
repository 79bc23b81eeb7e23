// Opaque handles. What C holds is no pointer but the number of a slot and the slot's generation, so that a handle that
// was freed, or that never was one, is an error and not a crash.
#pragma once

#include "status.h"

#include <memory>
#include <mutex>
#include <vector>

namespace llaisys {

template <class Object>
class Handles {
public:
    explicit Handles(const char *kind) : kind_(kind) {}

    uintptr_t add(std::shared_ptr<Object> object) {
        const std::lock_guard lock(mutex_);
        size_t i = 0;
        while (i < slots_.size() && slots_[i].object) ++i;
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
    uintptr_t key(size_t i) const { return (slots_[i].generation << INDEX_BITS | i) << 1 | 1; }

    size_t find(const void *handle) const {
        const auto value = reinterpret_cast<uintptr_t>(handle);
        const size_t i = value >> 1 & ((size_t(1) << INDEX_BITS) - 1);
        if (i >= slots_.size() || !slots_[i].object || key(i) != value)
            fail(LLAISYS_ERROR_HANDLE, "expected a %s, found %s", kind_,
                 handle ? "a handle that was freed or never was one" : "NULL");
        return i;
    }

    const char *kind_;
    std::mutex mutex_;
    std::vector<Slot> slots_;
};

} // namespace llaisys
