// Executor inside one node of a graph that ggml's threads compute together: the first thread leads, the others take parts of its work.
#pragma once

#include <atomic>
#include <cstdint>

#include "turboquant/kernels/executor.h"

namespace turboquant::ggml {

/// For one node, once. All threads of the node call it: the first lead(), its work with this executor, finish(); the others follow(), which
/// returns after finish(). Parts go to whoever is free, so a thread that comes late, or never runs, holds nobody up.
class NodeTeam final : public Executor {
  public:
    int n_threads() const override { return n_threads_; }
    void lead(int n_threads) { n_threads_ = n_threads; }
    void finish();
    void follow();

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override;

  private:
    using Part = void (*)(void* arg, int ith);
    static constexpr std::uint64_t kFinished = ~std::uint64_t{0};
    /// Takes a part of the call at hand; false if none is left.
    bool take();

    int n_threads_ = 1;
    /// Number of the call, and how many of its parts nobody took yet: a part is taken by counting down, which fails if the call is over.
    std::atomic<std::uint64_t> call_{0};
    std::atomic<int> unfinished_{0};
    std::atomic<Part> part_{nullptr};
    std::atomic<void*> arg_{nullptr};
};

}  // namespace turboquant::ggml
