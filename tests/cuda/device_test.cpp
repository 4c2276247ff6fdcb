// The device that the other tests run on; where there is none, the one test that says so in every build.
#include "tests/cuda/support.h"

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

}  // namespace
}  // namespace turboquant::cuda::test
