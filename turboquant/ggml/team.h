// Runs the parts of a piece of work on the thread team of the process.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace turboquant::ggml {

/// Calls f(ith) for ith in 0..n-1, possibly at the same time, and returns when all are done. f must not throw.
template <class F>
void run_team(int n, F&& f) {
    if (n <= 1) {
        f(0);
        return;
    }
#ifdef _OPENMP
    // The runtime may give fewer threads than asked for: hand out the parts by stride.
#pragma omp parallel num_threads(n)
    for (int i = omp_get_thread_num(); i < n; i += omp_get_num_threads()) f(i);
#else
    std::vector<std::thread> threads;
    for (int i = 1; i < n; i++) threads.emplace_back([&f, i] { f(i); });
    f(0);
    for (std::thread& t : threads) t.join();
#endif
}

}  // namespace turboquant::ggml
