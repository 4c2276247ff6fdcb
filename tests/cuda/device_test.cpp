// The device that the other tests run on; where there is none, the one test that says so in every build.
#include "tests/cuda/support.h"

#ifdef TQ_HAS_CUDA
#include <cuda_runtime_api.h>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/memory.h"
#include "turboquant/cuda/pieces.h"
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

// As many as there is room for, of all sizes, the last over the first.
TEST_F(Gpu, PiecesArrive) {
#ifdef TQ_HAS_CUDA
    constexpr std::size_t n = Pieces::kRoom / 4;
    std::vector<std::uint32_t> expected(n, 0xffffffffu), got(n);
    DeviceArray out;
    ASSERT_TRUE(out.reserve(4 * n, nullptr).ok());
    ASSERT_TRUE(to_device(out.as<void>(), expected.data(), 4 * n, nullptr).ok());
    Pieces pieces;
    const auto add = [&](std::size_t at, std::size_t words) {
        std::vector<std::uint32_t> data(words);
        for (std::size_t i = 0; i < words; ++i) data[i] = static_cast<std::uint32_t>(1000 * pieces.n + i);
        if (!pieces.add(out.as<std::uint32_t>() + at, data.data(), 4 * words)) return false;
        std::copy(data.begin(), data.end(), expected.begin() + static_cast<std::ptrdiff_t>(at));
        return true;
    };
    for (const std::size_t words : {1, 2, 3, 300, 257}) EXPECT_TRUE(add(words, words));
    EXPECT_TRUE(add(0, 5));
    EXPECT_FALSE(pieces.add(out.as<std::uint8_t>() + 2, expected.data(), 4)) << "not at a word";
    EXPECT_FALSE(pieces.add(out.as<void>(), expected.data(), 6)) << "half a word";
    EXPECT_FALSE(add(0, n - 567)) << "more than there is room for";
    EXPECT_TRUE(add(100, n - 568));
    ASSERT_TRUE(send(pieces, nullptr).ok());
    ASSERT_TRUE(to_host(got.data(), out.as<void>(), 4 * n, nullptr).ok());
    EXPECT_EQ(got, expected);
#endif
}

}  // namespace
}  // namespace turboquant::cuda::test
