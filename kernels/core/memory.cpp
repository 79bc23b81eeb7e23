#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace llaisys {

#if defined(__linux__)

static constexpr size_t PAGE = 4096;

void Memory::reserve(size_t bytes) {
    if (bytes <= size_) return;
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    // mremap moves pages without copying them. The kernel itself aligns large mappings so that huge pages fit.
    void *p = data_ ? mremap(data_, size_, bytes, MREMAP_MAYMOVE)
                    : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char *>(p);
    size_ = bytes;
    // Only advice: where the kernel has no huge pages it fails, and nothing is lost.
    madvise(data_, size_, pages_ == Pages::HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

void Memory::release_behind(size_t bytes) {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (bytes < size_) madvise(data_ + bytes, size_ - bytes, MADV_DONTNEED);
}

Memory::~Memory() {
    if (data_) munmap(data_, size_);
}

#else

void Memory::reserve(size_t bytes) {
    if (bytes <= size_) return;
    bytes = (bytes + 63) / 64 * 64;
    auto *p = static_cast<char *>(std::aligned_alloc(64, bytes));
    if (!p) throw std::bad_alloc();
    if (data_) std::memcpy(p, data_, size_);
    std::free(data_);
    data_ = p;
    size_ = bytes;
}

void Memory::release_behind(size_t) {}

Memory::~Memory() { std::free(data_); }

#endif

} // namespace llaisys
