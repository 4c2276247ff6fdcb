// The device that the other tests run on; where there is none, the one test that says so in every build.
#include "tests/cuda/support.h"

#ifdef TQ_HAS_CUDA
#include <cuda_runtime_api.h>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/memory.h"
#endif

namespace turboquant::cuda::test {
namespace {

TEST_F(Gpu, Device) {
#ifdef TQ_HAS_CUDA
    Device d;
    const Status status = query_device(0, d);
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_GE(d.compute_capability, 80) << "the kernels need sm_80 or later";
    EXPECT_GT(d.n_sm, 0);
    std::cout << d.name << ", sm_" << d.compute_capability << ", " << d.n_sm << " SMs, L2 " << (d.l2_bytes >> 20) << " MB\n";
    EXPECT_FALSE(query_device(1000, d).ok());
    EXPECT_FALSE(query_device(1000, d).message().empty());
#endif
}

// cudaGetLastError() tells of errors of calls before, which launches would take for their own.
TEST_F(Gpu, AnErrorIsNotTheNextLaunchs) {
#ifdef TQ_HAS_CUDA
    constexpr int n = 64;
    DeviceArray mask, out;
    ASSERT_TRUE(mask.reserve(n * sizeof(std::uint16_t), nullptr).ok());
    ASSERT_TRUE(out.reserve(n, nullptr).ok());
    MaskTiles m;
    m.mask = mask.as<std::uint16_t>(), m.n_tokens = 1, m.n_kv = n, m.token_stride = n, m.out = out.as<std::uint8_t>();
    EXPECT_FALSE(status_of(cudaMemcpy(out.as<void>(), nullptr, n, static_cast<cudaMemcpyKind>(99)), "a copy of no kind").ok());
    const Status status = summarize_mask(m, nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_TRUE(synchronize(nullptr).ok());
#endif
}

}  // namespace
}  // namespace turboquant::cuda::test
