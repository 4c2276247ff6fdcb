// Executor over threads that wait for work, for timings in which starting threads must not count.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

#include "turboquant/kernels/executor.h"

namespace turboquant::cli {

/// The caller is the first of its threads; thread t takes parts t, t + n_threads(), ...
class ThreadTeam final : public Executor {
  public:
    explicit ThreadTeam(int n) : barrier_(n) {
        for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { wait_for_work(i); });
    }
    ~ThreadTeam() override {
        part_ = nullptr;
        barrier_.arrive_and_wait();
    }
    int n_threads() const override { return static_cast<int>(threads_.size()) + 1; }

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override {
        part_ = part, arg_ = arg, n_parts_ = n;
        barrier_.arrive_and_wait();
        take_parts(0);
        barrier_.arrive_and_wait();
    }

  private:
    void take_parts(int first) {
        for (int i = first; i < n_parts_; i += n_threads()) part_(arg_, i);
    }
    void wait_for_work(int ith) {
        for (;;) {
            barrier_.arrive_and_wait();
            if (!part_) return;
            take_parts(ith);
            barrier_.arrive_and_wait();
        }
    }

    // Written only between barriers.
    void (*part_)(void* arg, int ith) = nullptr;
    void* arg_ = nullptr;
    int n_parts_ = 0;
    std::barrier<> barrier_;
    std::vector<std::jthread> threads_;
};

}  // namespace turboquant::cli
