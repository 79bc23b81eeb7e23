// Large blocks of memory straight from the operating system: pages that were never written cost nothing.
#pragma once

#include <cstddef>

namespace llaisys {

class Memory {
public:
    // Weights are read from end to end, where huge pages save a few percent, and half of the time that the system takes
    // to hand the memory out. A cache grows from nothing, where they would make the first token of each layer cost 2
    // MiB.
    enum class Pages { HUGE, SMALL };

    explicit Memory(Pages pages = Pages::SMALL) : pages_(pages) {}
    ~Memory();
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    // Makes room for `bytes`, keeping the contents, which may move. Throws std::bad_alloc.
    void reserve(size_t bytes);
    // Gives the pages behind `bytes` back, but for the next 256 KiB, keeping the room; what they held is lost.
    void release_behind(size_t bytes);
    char *data() const { return data_; }
    size_t size() const { return size_; }

private:
    Pages pages_;
    char *data_ = nullptr;
    size_t size_ = 0;
};

} // namespace llaisys
