// Who runs the parts of a piece of work. The library starts no thread: the caller hands one of these in.
#pragma once

#include <memory>
#include <type_traits>

namespace turboquant {

class Executor {
  public:
    virtual ~Executor() = default;
    /// Parts that run at the same time at most; at least 1.
    virtual int n_threads() const = 0;
    /// Calls f(ith) for ith in 0..n-1, possibly at the same time, and returns when all are done. n may be more than n_threads(). f must
    /// not throw and must not call run() of the same executor.
    template <class F>
    void run(int n, F&& f) {
        if (n == 1) return f(0);
        using Function = std::remove_reference_t<F>;
        run_parts(
            n, [](void* function, int ith) { (*static_cast<Function*>(function))(ith); }, std::addressof(f));
    }

  protected:
    /// part(arg, ith) for ith in 0..n-1.
    virtual void run_parts(int n, void (*part)(void* arg, int ith), void* arg) = 0;
};

/// On the calling thread.
class SerialExecutor final : public Executor {
  public:
    int n_threads() const override { return 1; }

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override {
        for (int i = 0; i < n; i++) part(arg, i);
    }
};

}  // namespace turboquant
