#include "threads.h"

#include "status.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <set>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <cstdio>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#endif

namespace llaisys {

namespace {

constexpr int MAX_THREADS = 1024;
constexpr int64_t POLL_INTERVAL = 50'000'000; // ns

// Nanoseconds, advancing every few milliseconds only: after each part of a job, even the 20 ns that the exact clock
// takes are felt.
int64_t coarse_clock() {
#if defined(__linux__)
    timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
#else
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
#endif
}

struct Scratch {
    void *data[SLOTS] = {};
    size_t size[SLOTS] = {};
    ~Scratch() {
        for (void *p : data) std::free(p);
    }
};
thread_local Scratch buffers;

// For the calls that an interrupt callback makes in the midst of another one: buffers of their own, as those of the
// thread are in use; and no callback, which would not be done with the last one.
thread_local bool inside_callback = false;
class Aside {
public:
    Aside() { change(); }
    ~Aside() { change(); }
    Aside(const Aside &) = delete;
    Aside &operator=(const Aside &) = delete;

private:
    void change() {
        inside_callback = !inside_callback;
        std::swap(others_.data, buffers.data);
        std::swap(others_.size, buffers.size);
    }
    Scratch others_;
};

struct Interrupt {
    LlaisysInterrupt callback = nullptr;
    void *user = nullptr;
    int64_t last = 0;
};
thread_local Interrupt interrupt;

bool interrupted() {
    if (!interrupt.callback || inside_callback) return false;
    const int64_t now = coarse_clock();
    if (now - interrupt.last < POLL_INTERVAL) return false;
    interrupt.last = now;
    const Aside aside;
    return interrupt.callback(interrupt.user) != 0;
}

// What parallel_run is given.
struct Task {
    void (*body)(void *, int64_t, int64_t);
    void *context;
    int64_t count, grain;
};

// One call of parallel_run. It lies on the stack of the caller, who leaves only when no worker looks at it any more.
struct Job {
    std::atomic<bool> stop{false};
    std::atomic<bool> out_of_memory{false};

    bool stopped() const { return stop.load(std::memory_order_relaxed); }

    // `poll` is for the calling thread only.
    void run(const Task &task, int64_t part, bool poll) noexcept {
        try {
            task.body(task.context, part * task.grain, std::min(part * task.grain + task.grain, task.count));
        } catch (...) { // kernels throw nothing but bad_alloc from scratch()
            out_of_memory = true;
            stop = true;
        }
        if (poll && interrupted()) stop = true;
    }
};

// The first part that member `i` of a team takes.
int64_t share_start(int64_t parts, int64_t i, int64_t members) { return parts * i / members; }

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Waits a while for `done`, without sleeping. First with pauses, 10 to 30 us (a pause is 40 to 140 cycles), within
// which decode issues the next operator; then, for the time that Python takes between two tokens, the core is offered
// to others at every turn. Waking a sleeper costs 5 to 50 us, so that a wait of this length pays. Only pauses for as
// long would make decode on a busy machine several times slower with two threads than with one: whoever spins keeps the
// partner from the core that it waits for.
template <class Done>
void spin_until(Done &&done) {
    constexpr int PAUSES = 1 << 9, YIELDS = 1 << 7;
    for (int i = 0; i < PAUSES; ++i) {
        if (done()) return;
        pause();
    }
    for (int i = 0; i < YIELDS; ++i) {
        for (int j = 0; j < 16; ++j) {
            if (done()) return;
            pause();
        }
        std::this_thread::yield();
    }
}

// A team that stays. Handing a job over and getting it back costs 0.2 us while the workers are awake, as little as two
// barriers of one long parallel region would, so that each operator may be a job of its own.
//
// Each worker has a ticket: an odd one offers it the job, and whoever makes it even, the worker or the caller, has
// taken the offer or called it off. So a worker that sleeps is woken and not waited for: the others do its share
// meanwhile. Nor can anyone take one job twice, as the next one is offered only after all that took this one have
// reported.
class Pool {
public:
    // Runs `task` on `threads` threads, this one among them. False if the pool is taken.
    bool run(const Task &task, Job &job, int threads, bool spin) {
        const Hold hold(busy_);
        if (!hold.mine) return false;
        grow(size_t(threads - 1));
        const size_t helpers = std::min(size_t(threads - 1), workers_.size());
        const int64_t parts = (task.count + task.grain - 1) / task.grain, members = int64_t(helpers) + 1;
        spin_.store(spin, std::memory_order_relaxed);
        pending_.store(int(helpers), std::memory_order_relaxed);
        for (size_t i = 0; i <= helpers; ++i) {
            share(i).next.store(share_start(parts, int64_t(i), members), std::memory_order_relaxed);
            share(i).end = share_start(parts, int64_t(i + 1), members);
        }
        for (size_t i = 0; i < helpers; ++i) {
            workers_[i]->task = task;
            workers_[i]->job = &job;
            workers_[i]->members = uint32_t(members);
            workers_[i]->ticket.fetch_add(1, std::memory_order_release);
            workers_[i]->ticket.notify_one();
        }
        work(0, uint32_t(members), task, job);
        for (size_t i = 0; i < helpers; ++i) {
            uint32_t ticket = workers_[i]->ticket.load(std::memory_order_relaxed);
            if (ticket % 2 == 1 && workers_[i]->ticket.compare_exchange_strong(ticket, ticket + 1))
                pending_.fetch_sub(1, std::memory_order_relaxed);
        }
        if (spin) spin_until([&] { return pending_.load(std::memory_order_acquire) == 0; });
        for (int left; (left = pending_.load(std::memory_order_acquire)) != 0;) pending_.wait(left);
        return true;
    }

private:
    // Nobody waits for the pool, so that a flag will do.
    struct Hold {
        explicit Hold(std::atomic<bool> &busy) : flag(busy), mine(!busy.exchange(true, std::memory_order_acquire)) {}
        ~Hold() {
            if (mine) flag.store(false, std::memory_order_release);
        }
        Hold(const Hold &) = delete;
        Hold &operator=(const Hold &) = delete;
        std::atomic<bool> &flag;
        const bool mine;
    };
    // The parts [next, end) of a job that are one member's to begin with: they lie side by side, so that it reads
    // memory in one stream. Who has finished takes from the others.
    struct Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    // All that a worker needs lies in the line of its ticket: each line more that it has to fetch costs 50 ns, and 250
    // where the two cores have no cache in common. The rest is written before the ticket is raised, and read after it
    // was taken.
    struct alignas(64) Worker {
        std::atomic<uint32_t> ticket{0};
        uint32_t members = 0;
        Share share;
        Task task{};
        Job *job = nullptr;
    };
    static_assert(sizeof(Worker) == 64);

    // Member 0 is the caller.
    Share &share(size_t member) { return member == 0 ? own_ : workers_[member - 1]->share; }

    void work(uint32_t member, uint32_t members, const Task &task, Job &job) noexcept {
        for (uint32_t i = 0; i < members; ++i) {
            Share &parts = share((member + i) % members);
            while (parts.next.load(std::memory_order_relaxed) < parts.end && !job.stopped()) {
                const int64_t part = parts.next.fetch_add(1, std::memory_order_relaxed);
                if (part < parts.end) job.run(task, part, member == 0);
            }
        }
    }

    void grow(size_t wanted) {
        while (workers_.size() < wanted) {
            auto worker = std::make_unique<Worker>();
            workers_.reserve(workers_.size() + 1);
            try {
                std::thread(&Pool::serve, this, worker.get(), uint32_t(workers_.size() + 1)).detach();
            } catch (const std::system_error &) { // no more threads to be had: go on with those there are
                return;
            }
            workers_.push_back(std::move(worker));
        }
    }

    void serve(Worker *worker, uint32_t member) noexcept {
        auto &ticket = worker->ticket;
        for (;;) {
            uint32_t seen = ticket.load(std::memory_order_acquire);
            if (seen % 2 == 1 && ticket.compare_exchange_strong(seen, seen + 1, std::memory_order_acquire)) {
                work(member, worker->members, worker->task, *worker->job);
                if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
                ++seen;
            }
            if (seen % 2 == 1) continue;
            if (spin_.load(std::memory_order_relaxed))
                spin_until([&] { return ticket.load(std::memory_order_relaxed) != seen; });
            ticket.wait(seen, std::memory_order_relaxed);
        }
    }

    std::atomic<bool> busy_{false};
    std::vector<std::unique_ptr<Worker>> workers_;
    Share own_; // of the caller
    alignas(64) std::atomic<int> pending_{0};
    std::atomic<bool> spin_{false};
};

// Never destroyed: its threads run until the process ends. After fork() the child has none of the threads and perhaps
// one that is taken, so it starts over with a new pool and leaves the old one alone.
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
    const Task task{body, context, count, grain};
    Job job;
    const int64_t parts = (count + grain - 1) / grain;
    const int threads = int(std::min<int64_t>(num_threads(), parts));
    bool done = false;
    if (threads > 1 && !inside_pool) {
        inside_pool = true;
        done = pool().run(task, job, threads, threads <= cores());
        inside_pool = false;
    }
    for (int64_t part = 0; !done && part < parts && !job.stopped(); ++part) job.run(task, part, true);
    if (job.out_of_memory) throw std::bad_alloc();
    if (job.stop) fail(LLAISYS_ERROR_INTERRUPTED, "interrupted");
}

bool starts_share(int64_t part, int64_t parts) {
    const int64_t members = std::min<int64_t>(num_threads(), parts);
    for (int64_t i = 0; i <= members; ++i)
        if (share_start(parts, i, members) == part) return true;
    return false;
}

int64_t grain_for(int64_t count, int64_t least) {
    constexpr int PARTS_PER_THREAD = 4; // evens out threads of unequal speed
    const int64_t parts = int64_t(num_threads()) * PARTS_PER_THREAD;
    return std::max(least, (count + parts - 1) / parts);
}

void *scratch(Slot slot, size_t bytes) {
    if (buffers.size[slot] < bytes) {
        const size_t grown = buffers.size[slot] + buffers.size[slot] / 2;
        std::free(buffers.data[slot]);
        buffers.data[slot] = nullptr;
        buffers.size[slot] = 0;
        // Half as much again at least: what grows with a sequence is not to be allocated anew every few tokens.
        const size_t rounded = (std::max(bytes, grown) + 4095) / 4096 * 4096;
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

int32_t llaisysParallelFor(int64_t count, int64_t grain, LlaisysPart body, void *context) {
    return llaisys::guarded("parallel_for", [&] {
        if (!body) llaisys::fail(LLAISYS_ERROR_INVALID_ARGUMENT, "body: expected a function, found NULL");
        llaisys::parallel_run(count, grain, body, context);
    });
}

int32_t llaisysSetInterrupt(LlaisysInterrupt callback, void *user) {
    llaisys::interrupt = {callback, user, 0};
    return LLAISYS_OK;
}
}
