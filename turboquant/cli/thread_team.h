// Threads that wait for work, for timings in which starting threads must not count.
#pragma once

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

namespace turboquant::cli {

class ThreadTeam {
  public:
    explicit ThreadTeam(int n) : barrier_(n) {
        for (int i = 1; i < n; i++) threads_.emplace_back([this, i] { wait_for_work(i); });
    }
    ~ThreadTeam() {
        work_ = nullptr;
        barrier_.arrive_and_wait();
    }
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    /// f(ith) on every thread, the caller being the first; returns when all are done. f must not throw.
    void run(const std::function<void(int)>& f) {
        work_ = &f;
        barrier_.arrive_and_wait();
        f(0);
        barrier_.arrive_and_wait();
    }

  private:
    void wait_for_work(int ith) {
        for (;;) {
            barrier_.arrive_and_wait();
            if (!work_) return;
            (*work_)(ith);
            barrier_.arrive_and_wait();
        }
    }

    const std::function<void(int)>* work_ = nullptr;  // written only between barriers
    std::barrier<> barrier_;
    std::vector<std::jthread> threads_;
};

}  // namespace turboquant::cli
