// Tests that need a GPU: skipped with the reason where there is none.
#pragma once

#include <gtest/gtest.h>

#include <string>

#ifdef TQ_HAS_CUDA
#include "turboquant/cuda/status.h"
#endif

namespace turboquant::cuda::test {

/// Why GPU tests cannot run here; empty if they can.
inline std::string no_gpu_reason() {
#ifdef TQ_HAS_CUDA
    int n = 0;
    const Status status = count_devices(n);
    return status.ok() && n > 0 ? "" : "no GPU: " + (status.ok() ? "none is visible" : status.message());
#else
    return "built without CUDA (no nvcc was found, or TQ_CUDA is OFF)";
#endif
}

class Gpu : public testing::Test {
  protected:
    void SetUp() override {
        if (const std::string reason = no_gpu_reason(); !reason.empty()) GTEST_SKIP() << reason;
    }
};

}  // namespace turboquant::cuda::test
