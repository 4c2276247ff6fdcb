#include "turboquant/ggml/node_team.h"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace turboquant::ggml {
namespace {

constexpr int kSpins = 4000;  // some 50 to 100 us: longer than a leader's serial work in generation

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

constexpr std::uint64_t parts_left(std::uint64_t call) { return call & 0xffffffff; }

}  // namespace

bool NodeTeam::take() {
    std::uint64_t call = call_.load(std::memory_order_acquire);
    do {
        if (call == kFinished || parts_left(call) == 0) return false;
    } while (!call_.compare_exchange_weak(call, call - 1, std::memory_order_acquire));
    // The leader waits for this part, so the call's fields stay.
    part_.load(std::memory_order_relaxed)(arg_.load(std::memory_order_relaxed), static_cast<int>(parts_left(call)) - 1);
    unfinished_.fetch_sub(1, std::memory_order_release);
    return true;
}

void NodeTeam::run_parts(int n, Part part, void* arg) {
    if (n_threads_ == 1) {
        for (int i = 0; i < n; i++) part(arg, i);
        return;
    }
    part_.store(part, std::memory_order_relaxed);
    arg_.store(arg, std::memory_order_relaxed);
    unfinished_.store(n, std::memory_order_relaxed);
    const std::uint64_t number = (call_.load(std::memory_order_relaxed) >> 32) + 1;
    call_.store(number << 32 | static_cast<std::uint32_t>(n), std::memory_order_release);
    call_.notify_all();
    while (take()) {
    }
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) > 0; spins++)
        if (spins < kSpins)
            relax();
        else
            std::this_thread::yield();
}

void NodeTeam::finish() {
    call_.store(kFinished, std::memory_order_release);
    call_.notify_all();
}

void NodeTeam::follow() {
    for (int spins = 0;;) {
        const std::uint64_t call = call_.load(std::memory_order_acquire);
        if (call == kFinished) return;
        if (take())
            spins = 0;
        else if (spins++ < kSpins)
            relax();
        else if (parts_left(call) == 0)
            call_.wait(call, std::memory_order_acquire);
    }
}

}  // namespace turboquant::ggml
