// Memory that is needed next, asked for line after line beside the work on what came before.
//
// For few rows of queries keys and values are read at the speed of memory at best. The rows of one head are no stream
// that the processor's own prefetcher would see, as those of the other heads lie between, and asking for the rows of a
// panel at once fills the queues for misses. In one stream over the rows of all heads, a few lines beside each piece of
// the work, one token of bf16 over 2048 cold keys took 64 us instead of 124 (12 heads, 2 kv heads of 128, two threads
// of Zen 5), 34 instead of 60 (14, 2 of 64), and 279 instead of 500 (32, 8 of 128). Reading the next block through
// before the work on it gave 78 us; reading it instead of prefetching beside the work, 89; the prefetch into the
// second-level cache only, 95, where that into the first gave 81.
#pragma once

#include "core/tier.h"

namespace llaisys::LLAISYS_TIER {

class Ahead {
public:
    // Lines that are to be asked for beside a piece of the work, in steps of equal size.
    struct Share {
        Ahead &ahead;
        int64_t lines;
        int64_t each(int64_t steps) const { return (lines + steps - 1) / steps; }
    };

    // `count` rows of `bytes` bytes come next. If SETS sets of rows are waiting, they are not asked for.
    void add(const char *at, int64_t step, int64_t bytes, int64_t count) {
        if (now_ == added_) now_ = added_ = 0;
        if (added_ == SETS) return;
        rows_[added_++] = {at, step, bytes, count, 0};
        lines_ += count * ((bytes + LINE - 1) / LINE);
    }
    int64_t lines() const { return lines_; }
    void ask(int64_t lines) {
        for (; lines > 0 && now_ < added_; --lines, --lines_) {
            Rows &r = rows_[now_];
            __builtin_prefetch(r.at + r.column);
            if ((r.column += LINE) < r.bytes) continue;
            r.column = 0;
            r.at += r.step;
            if (--r.count == 0) ++now_;
        }
    }
    // Shares all that was added out to `parts` of the work, and the share of `some` of the `whole` of one.
    void plan(int64_t parts) { part_ = (lines_ + parts - 1) / parts; }
    Share share(int64_t some, int64_t whole) { return {*this, (part_ * some + whole - 1) / whole}; }

private:
    static constexpr int64_t LINE = 64;
    static constexpr int SETS = 4; // two blocks of keys and values
    struct Rows {
        const char *at;
        int64_t step, bytes, count, column;
    };
    Rows rows_[SETS];
    int now_ = 0, added_ = 0;
    int64_t lines_ = 0, part_ = 0;
};

} // namespace llaisys::LLAISYS_TIER
