// The thread pool, the interrupt callback, and per-thread scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace llaisys {

// Threads that parallel_for uses, the calling one among them.
int num_threads();

// Calls `body(context, begin, end)` on parts of [0, count) that together cover it once, each of at most `grain` items,
// on several threads. A thread takes parts that lie side by side, from the first on, and helps the others when it has
// none left. The results must not depend on how the range is cut. Runs in the calling thread alone if another call has
// the pool, so that several threads may compute at once. Polls the interrupt callback after every part; throws Failure
// then: a part should not take more than some ten milliseconds.
void parallel_run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context);

template <class Body>
void parallel_for(int64_t count, int64_t grain, Body &&body) {
    using B = std::remove_reference_t<Body>;
    parallel_run(
        count, grain, [](void *context, int64_t begin, int64_t end) { (*static_cast<B *>(context))(begin, end); },
        const_cast<std::remove_const_t<B> *>(&body));
}

// Whether the first of `parts` parts that a thread takes, as long as none is late, is `part`; so it is said of the one
// behind the last.
bool starts_share(int64_t part, int64_t parts);

// Items per part so that each thread gets a few parts and none is smaller than `least`.
int64_t grain_for(int64_t count, int64_t least);

// Memory of the calling thread that stays allocated between calls, 64-byte aligned. One buffer per slot; asking for a
// slot again invalidates what it held. Throws std::bad_alloc.
enum Slot : int { SLOT_INPUT, SLOT_TABLE, SLOT_PARTIAL, SLOT_WORK, SLOTS };
void *scratch(Slot slot, size_t bytes);

} // namespace llaisys
