// Executor over threads of the plugin's own, for a backend that runs nothing but KV operations.
#pragma once

#include "turboquant/kernels/executor.h"

#ifndef _OPENMP
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace turboquant::ggml {

/// The OpenMP team of the process where the compiler has one, which ggml's CPU backend uses too; else threads that end with the call.
class TeamExecutor final : public Executor {
  public:
    int n_threads() const override { return n_threads_; }
    void set_n_threads(int n) { n_threads_ = n < 1 ? 1 : n; }

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override {
        const int team = n < n_threads_ ? n : n_threads_;
#ifdef _OPENMP
        // The runtime may give fewer threads than asked for: hand out the parts by stride.
#pragma omp parallel num_threads(team)
        for (int i = omp_get_thread_num(); i < n; i += omp_get_num_threads()) part(arg, i);
#else
        const auto stride = [=](int first) {
            for (int i = first; i < n; i += team) part(arg, i);
        };
        std::vector<std::thread> threads;
        for (int i = 1; i < team; i++) threads.emplace_back(stride, i);
        stride(0);
        for (std::thread& t : threads) t.join();
#endif
    }

  private:
    int n_threads_ = 1;
};

}  // namespace turboquant::ggml
