// A loop over threads.
#pragma once

#include <cstddef>
#include <thread>
#include <vector>

namespace turboquant::measure {

/// Calls f(i) for i < n on n_threads threads. f must not throw.
template <class F>
void parallel_for(std::size_t n, int n_threads, F&& f) {
    std::vector<std::jthread> threads;
    const auto step = static_cast<std::size_t>(n_threads);
    for (std::size_t t = 1; t < step; t++)
        threads.emplace_back([&f, n, t, step] {
            for (std::size_t i = t; i < n; i += step) f(i);
        });
    for (std::size_t i = 0; i < n; i += step) f(i);
}

}  // namespace turboquant::measure
