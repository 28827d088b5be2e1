// Threads that do kernels together: all of them call each kernel, and each does its share. Part of kernels.cpp.
// OpenMP brings them together, once for a kernel or once for a whole recording; between the kernels of a recording they
// wait for each other here, because OpenMP lets them sleep as soon as a process has more threads than processors.
#pragma once
#include <atomic>
#include <omp.h>

namespace {

// Some 50 microseconds: to wake somebody who sleeps takes as long where processors are virtual.
constexpr int SPINS = 4000;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Board {  // what a team shares
    alignas(64) std::atomic<int> num_here{0};
    alignas(64) std::atomic<int> num_meetings{0};
    alignas(64) std::atomic<int64_t> next{0};
    void *shared = nullptr;

    void meet(int size) {
        const int meeting = num_meetings.load(std::memory_order_acquire);
        if (num_here.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            num_here.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            num_meetings.store(meeting + 1, std::memory_order_release);
            num_meetings.notify_all();
            return;
        }
        for (int spin = 0; spin < SPINS; spin++, relax())
            if (num_meetings.load(std::memory_order_acquire) != meeting) return;
        num_meetings.wait(meeting, std::memory_order_acquire);
    }
};

struct Team {  // as one of its threads sees it
    int rank, size;
    Board *board;

    void meet() const { board->meet(size); }

    // Equal shares.
    template <class F> void each(int64_t count, F work) const {
        const int64_t share = (count + size - 1) / size, first = rank * share;
        for (int64_t i = first; i < std::min(first + share, count); i++) work(i);
    }

    // Whoever is free takes the next one, because some are longer. Once between two meetings.
    template <class F> void each_in_turn(int64_t count, F work) const {
        for (int64_t i; (i = board->next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    }

    // One for all, which `prepare` has made large enough; kept, because fresh memory is slow. Once in a kernel.
    template <class T, class F> T &shared(F prepare) const {
        static thread_local T kept;
        if (rank == 0) prepare(kept), board->shared = &kept;
        meet();
        return *static_cast<T *>(board->shared);
    }
};

thread_local const Team *joined = nullptr;  // while a recording is replayed

// Does a kernel with all threads, or alone where it is not worth waking them.
template <class F> void on_team(int threads, bool is_worth, F work) {
    if (joined) {
        work(*joined);
        joined->meet();
        return;
    }
    Board board;
    if (threads == 1 || !is_worth) {
        work(Team{0, 1, &board});
        return;
    }
#pragma omp parallel num_threads(threads)
    work(Team{omp_get_thread_num(), omp_get_num_threads(), &board});
}

}  // namespace
