// What the machine can do at best: memory read from end to end, and arithmetic on registers alone. Measured with the
// threads and the flags that the kernels have, so that a kernel's share of it says what is left to win.
#include "core/tier.h"

#if defined(__AMX_BF16__)
#include "core/amx.h"
#endif

namespace llaisys {

// Adds up `bytes` of memory, a multiple of READ_STEP, fetching `ahead` bytes before they are needed (0: not).
using ReadFn = float(const char *p, int64_t bytes, int64_t ahead);
constexpr int64_t READ_STEP = 512, LINE = 64;
// Does `rounds` rounds of products and sums; returns how many of both together, and what they came to.
struct Work {
    int64_t flops;
    float result;
};
using ComputeFn = Work(int64_t rounds);

namespace LLAISYS_TIER {

ReadFn roof_read;
float roof_read(const char *p, int64_t bytes, int64_t ahead) {
    constexpr int SUMS = 8;
    Vec sum[SUMS];
    for (Vec &s : sum) s = zero();
    for (const char *end = p + bytes; p < end; p += READ_STEP) {
        if (ahead)
            for (int64_t i = 0; i < READ_STEP; i += LINE) __builtin_prefetch(p + ahead + i);
        const auto *x = (const float *)p;
        for (int i = 0; i < READ_STEP / int(sizeof(float)) / Vec::N; ++i)
            sum[i % SUMS] = sum[i % SUMS] + load(x + i * Vec::N);
    }
    Vec total = zero();
    for (const Vec s : sum) total = total + s;
    return hsum(total);
}

// Twelve sums hide the latency of two units, and with both factors fit into the sixteen registers of AVX2.
ComputeFn roof_f32;
Work roof_f32(int64_t rounds) {
    constexpr int SUMS = 12;
    const Vec a = set1(0.5f), b = set1(0x1p-20f);
    Vec sum[SUMS];
    for (Vec &s : sum) s = zero();
    for (int64_t i = 0; i < rounds; ++i)
        for (Vec &s : sum) s = fma(a, b, s);
    Vec total = zero();
    for (const Vec s : sum) total = total + s;
    return {rounds * SUMS * Vec::N * 2, hsum(total)};
}

#if defined(__AMX_BF16__)

ComputeFn roof_bf16;
Work roof_bf16(int64_t rounds) {
    tile_configure(whole_tiles());
    alignas(64) bf16 factors[16][32];
    for (auto &row : factors)
        for (bf16 &x : row) x.bits = 0x3a80; // 2^-10
    tile_load<4>(factors, 64);
    tile_load<5>(factors, 64);
    tile_load<6>(factors, 64);
    tile_load<7>(factors, 64);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t i = 0; i < rounds; ++i) {
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        tile_dot<2, 5, 6>();
        tile_dot<3, 5, 7>();
    }
    alignas(64) float sums[16][16];
    tile_store<3>(sums, 64);
    tile_release();
    return {rounds * 4 * 16 * 16 * 32 * 2, sums[0][0]};
}

#elif defined(__AVX512BF16__)

ComputeFn roof_bf16;
Work roof_bf16(int64_t rounds) {
    constexpr int SUMS = 12;
    const auto a = __m512bh(_mm512_set1_epi16(0x3a80)), b = __m512bh(_mm512_set1_epi16(0x3b00));
    __m512 sum[SUMS];
    for (__m512 &s : sum) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < rounds; ++i)
        for (__m512 &s : sum) s = _mm512_dpbf16_ps(s, a, b);
    __m512 total = _mm512_setzero_ps();
    for (const __m512 s : sum) total = _mm512_add_ps(total, s);
    return {rounds * SUMS * 32 * 2, hsum({total})};
}

#endif

} // namespace LLAISYS_TIER
} // namespace llaisys

#ifdef LLAISYS_ONCE
#include "core/cpu.h"
#include "core/memory.h"
#include "core/status.h"
#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace llaisys {

LLAISYS_KERNEL(roof_read, ReadFn);
LLAISYS_KERNEL(roof_f32, ComputeFn);
#if defined(__x86_64__)
namespace avx512bf16 { ComputeFn roof_bf16; }
namespace amx { ComputeFn roof_bf16; }
static constexpr Kernel<ComputeFn> roof_bf16_kernel(nullptr, nullptr, nullptr, amx::roof_bf16, avx512bf16::roof_bf16);
#else
static constexpr Kernel<ComputeFn> roof_bf16_kernel(nullptr, nullptr, nullptr, nullptr);
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// The least time that `once` took, called until `seconds` have passed, and five times at least.
template <class Once>
double least_time(double seconds, Once &&once) {
    const auto start = Clock::now();
    double best = 1e9;
    for (int i = 0; i < 5 || Seconds(Clock::now() - start).count() < seconds; ++i) {
        const auto before = Clock::now();
        once();
        best = std::min(best, Seconds(Clock::now() - before).count());
    }
    return best;
}

// Bytes that no cache holds: four times the last level, within reason.
int64_t uncached_bytes() {
    int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(4 * cache, 256 << 20, 2LL << 30);
}

std::atomic<float> kept; // so that no compiler finds the results to be of no use

double measure_read(double seconds) {
    int tier = TIERS - 1;
    while (!roof_read_kernel.tier[tier] || !has_tier(Tier(tier))) --tier;
    constexpr int64_t PIECE = 16 << 20;
    const int64_t bytes = uncached_bytes() / PIECE * PIECE;
    constexpr int64_t ahead[] = {0, 1024, 4096};
    Memory memory(Memory::Pages::HUGE);
    memory.reserve(size_t(bytes + ahead[2] + READ_STEP));
    char *data = memory.data();
    parallel_for(bytes / PIECE, 1, [&](int64_t begin, int64_t end) {
        std::memset(data + begin * PIECE, 0, size_t((end - begin) * PIECE));
    });
    double best = 1e9;
    for (const int64_t distance : ahead)
        best = std::min(best, least_time(seconds / 3, [&] {
                            parallel_for(bytes / PIECE, 1, [&](int64_t begin, int64_t end) {
                                kept =
                                    roof_read_kernel.tier[tier](data + begin * PIECE, (end - begin) * PIECE, distance);
                            });
                        }));
    return double(bytes) / best;
}

double measure_compute(ComputeFn *kernel, double seconds) {
    const int threads = num_threads();
    std::atomic<int64_t> flops{0};
    const auto run = [&](int64_t rounds) {
        flops = 0;
        parallel_for(threads, 1, [&](int64_t, int64_t) {
            const Work work = kernel(rounds);
            flops += work.flops;
            kept = work.result;
        });
    };
    // Parts of two milliseconds: none is done before the last thread has begun.
    int64_t rounds = 1000;
    for (double took = 0; took < 2e-3; rounds *= 2) took = least_time(0, [&] { run(rounds); });
    const double best = least_time(seconds, [&] { run(rounds); });
    return double(flops) / best;
}

double measure(const char *roof, double seconds) {
    struct Compute {
        const char *name;
        ComputeFn *kernel;
        bool there;
    };
    if (std::strcmp(roof, "read") == 0) return measure_read(seconds);
    const auto &f32 = roof_f32_kernel.tier;
    const Compute all[] = {
        {"scalar_f32", f32[SCALAR], true},
        {"avx2_f32", f32[AVX2], has_tier(AVX2)},
        {"avx512_f32", f32[AVX512], has_tier(AVX512)},
        {"avx512_bf16", roof_bf16_kernel.bf16, has_tier(AVX512) && has_avx512_bf16()},
        {"amx_bf16", roof_bf16_kernel.tier[AMX], has_tier(AMX)},
    };
    for (const Compute &one : all)
        if (std::strcmp(roof, one.name) == 0) {
            if (!one.kernel || !one.there) fail(LLAISYS_ERROR_UNSUPPORTED, "roof: this machine has no %s", roof);
            return measure_compute(one.kernel, seconds);
        }
    fail(LLAISYS_ERROR_INVALID_ARGUMENT,
         "roof: expected read, scalar_f32, avx2_f32, avx512_f32, avx512_bf16 or amx_bf16, found %.40s", roof);
}

} // namespace
} // namespace llaisys

extern "C" int32_t llaisysMeasureRoof(const char *roof, double seconds, double *per_second) {
    return llaisys::guarded("measure_roof", [&] {
        if (!roof) llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "roof: expected a name, found NULL");
        if (!per_second) llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "per_second: expected an address, found NULL");
        if (!(seconds >= 0 && seconds <= 60))
            llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "seconds: expected 0 to 60, found %g", seconds);
        *per_second = llaisys::measure(roof, seconds);
    });
}
#endif
