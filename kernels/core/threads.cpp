#include "threads.h"

#include "status.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <cstdio>
#include <pthread.h>
#include <sched.h>
#endif

namespace llaisys {

namespace {

constexpr int MAX_THREADS = 1024;
using Clock = std::chrono::steady_clock;
constexpr auto POLL_INTERVAL = std::chrono::milliseconds(50);

struct Interrupt {
    LlaisysInterrupt callback = nullptr;
    void *user = nullptr;
    Clock::time_point last{};
};
thread_local Interrupt interrupt;

bool interrupted() {
    if (!interrupt.callback) return false;
    const auto now = Clock::now();
    if (now - interrupt.last < POLL_INTERVAL) return false;
    interrupt.last = now;
    return interrupt.callback(interrupt.user) != 0;
}

// One call of parallel_run. It lies on the stack of the caller, who leaves only when no worker looks at it any more.
struct Job {
    void (*body)(void *, int64_t, int64_t);
    void *context;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    std::atomic<bool> out_of_memory{false};

    // Takes parts until none is left; `poll` is for the calling thread only.
    void work(bool poll) noexcept {
        while (!stop.load(std::memory_order_relaxed)) {
            const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
            if (begin >= count) return;
            try {
                body(context, begin, std::min(begin + grain, count));
            } catch (...) { // kernels throw nothing but bad_alloc from scratch()
                out_of_memory = true;
                stop = true;
            }
            if (poll && interrupted()) stop = true;
        }
    }
};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Each worker waits on a ticket of its own, so that only those a job needs are woken, and none can take one job twice:
// the next ticket is raised only after all that were needed have reported.
class Pool {
public:
    // Runs `job` on `threads` threads, this one among them. False if the pool is taken.
    bool run(Job &job, int threads, bool spin) {
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (!lock.owns_lock()) return false;
        grow(size_t(threads - 1));
        const size_t helpers = std::min(size_t(threads - 1), workers_.size());
        job_ = &job;
        spin_.store(spin, std::memory_order_relaxed);
        pending_.store(int(helpers), std::memory_order_relaxed);
        for (size_t i = 0; i < helpers; ++i) {
            workers_[i]->ticket.fetch_add(1, std::memory_order_release);
            workers_[i]->ticket.notify_one();
        }
        job.work(true);
        for (int i = 0; spin && i < SPINS && pending_.load(std::memory_order_acquire) != 0; ++i) pause();
        for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;) pending_.wait(left);
        return true;
    }

private:
    struct alignas(64) Worker {
        std::atomic<uint32_t> ticket{0};
    };

    // 10 to 30 us, a pause being 40 to 140 cycles: decode issues the next operator within that time, while a sleeping
    // worker costs 5 to 50 us to wake. Eight times as long made decode on a busy machine 7 times slower with two
    // threads than with one: whoever spins keeps the partner from the core that it waits for.
    static constexpr int SPINS = 1 << 9;

    void grow(size_t wanted) {
        while (workers_.size() < wanted) {
            auto worker = std::make_unique<Worker>();
            workers_.reserve(workers_.size() + 1);
            try {
                std::thread(&Pool::serve, this, worker.get()).detach();
            } catch (const std::system_error &) { // no more threads to be had: go on with those there are
                return;
            }
            workers_.push_back(std::move(worker));
        }
    }

    void serve(Worker *worker) noexcept {
        for (uint32_t seen = 0;; ++seen) {
            const int spins = spin_.load(std::memory_order_relaxed) ? SPINS : 0;
            for (int i = 0; i < spins && worker->ticket.load(std::memory_order_acquire) == seen; ++i) pause();
            worker->ticket.wait(seen, std::memory_order_acquire);
            job_->work(false);
            if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
        }
    }

    std::mutex busy_;
    std::vector<std::unique_ptr<Worker>> workers_;
    Job *job_ = nullptr; // written before a ticket is raised, read after it was seen
    std::atomic<int> pending_{0};
    std::atomic<bool> spin_{false};
};

// Never destroyed: its threads run until the process ends. After fork() the child has none of the threads and perhaps a
// locked mutex, so it starts over with a new pool and leaves the old one alone.
std::atomic<Pool *> the_pool{nullptr};
thread_local bool inside_pool = false;

Pool &pool() {
    static const bool once = [] {
        the_pool = new Pool;
#if defined(__linux__)
        pthread_atfork(nullptr, nullptr, [] {
            the_pool = new (std::nothrow) Pool;
            inside_pool = false;
        });
#endif
        return true;
    }();
    (void)once;
    return *the_pool.load();
}

// Cores that the process may use, hyperthreads counted once.
int physical_cores() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::pair<int, int>> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            const auto read = [cpu](const char *file) {
                char path[96];
                std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, file);
                int value = -1;
                if (std::FILE *f = std::fopen(path, "r")) {
                    if (std::fscanf(f, "%d", &value) != 1) value = -1;
                    std::fclose(f);
                }
                return value;
            };
            const int core = read("core_id");
            cores.insert(core < 0 ? std::pair{-1, cpu} : std::pair{read("physical_package_id"), core});
        }
        if (!cores.empty()) return int(cores.size());
    }
#endif
    return std::max(1, int(std::thread::hardware_concurrency()));
}

int cores() {
    static const int count = std::min(physical_cores(), MAX_THREADS);
    return count;
}

std::atomic<int> threads_wanted{0};

int initial_threads() {
    if (const char *text = std::getenv("LLAISYS_NUM_THREADS")) {
        char *end = nullptr;
        const long value = std::strtol(text, &end, 10);
        if (end != text && *end == 0 && value >= 1 && value <= MAX_THREADS) return int(value);
        if (*text)
            fail(LLAISYS_ERROR_INVALID_ARGUMENT, "LLAISYS_NUM_THREADS: expected 1 to %d, found %.40s", MAX_THREADS,
                 text);
    }
    return cores();
}

struct Scratch {
    void *data[SLOTS] = {};
    size_t size[SLOTS] = {};
    ~Scratch() {
        for (void *p : data) std::free(p);
    }
};
thread_local Scratch buffers;

} // namespace

int num_threads() {
    int n = threads_wanted.load(std::memory_order_relaxed);
    if (n == 0) {
        const int initial = initial_threads();
        if (threads_wanted.compare_exchange_strong(n, initial)) n = initial;
    }
    return n;
}

void parallel_run(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    Job job{body, context, count, grain};
    const int64_t parts = (count + grain - 1) / grain;
    const int threads = int(std::min<int64_t>(num_threads(), parts));
    bool done = false;
    if (threads > 1 && !inside_pool) {
        inside_pool = true;
        done = pool().run(job, threads, threads <= cores());
        inside_pool = false;
    }
    if (!done) job.work(true);
    if (job.out_of_memory) throw std::bad_alloc();
    if (job.stop) fail(LLAISYS_ERROR_INTERRUPTED, "interrupted");
}

int64_t grain_for(int64_t count, int64_t least) {
    constexpr int PARTS_PER_THREAD = 4; // evens out threads of unequal speed
    const int64_t parts = int64_t(num_threads()) * PARTS_PER_THREAD;
    return std::max(least, (count + parts - 1) / parts);
}

void *scratch(Slot slot, size_t bytes) {
    if (buffers.size[slot] < bytes) {
        std::free(buffers.data[slot]);
        buffers.data[slot] = nullptr;
        buffers.size[slot] = 0;
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        buffers.data[slot] = std::aligned_alloc(64, rounded);
        if (!buffers.data[slot]) throw std::bad_alloc();
        buffers.size[slot] = rounded;
    }
    return buffers.data[slot];
}

} // namespace llaisys

extern "C" {

int32_t llaisysSetNumThreads(int32_t count) {
    return llaisys::guarded("set_num_threads", [&] {
        if (count < 1 || count > llaisys::MAX_THREADS)
            llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "expected 1 to %d, found %d", llaisys::MAX_THREADS, count);
        llaisys::threads_wanted = count;
    });
}

int32_t llaisysNumThreads(void) {
    int32_t count = 0;
    const int32_t status = llaisys::guarded("num_threads", [&] { count = llaisys::num_threads(); });
    return status == LLAISYS_OK ? count : status;
}

int32_t llaisysSetInterrupt(LlaisysInterrupt callback, void *user) {
    llaisys::interrupt = {callback, user, {}};
    return LLAISYS_OK;
}
}
