// Cosines and sines of positions as the kernels make them, a dim at a time, without a GPU: against exact ones.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/cuda/impl/rows.h"

namespace turboquant::cuda {
namespace {

TEST(RowsEmulated, TurnsOfEachDim) {
    constexpr int kDim = 128, kDims = 64, kPairs = kDims / 2;
    std::vector<double> frequencies(kPairs);
    for (int i = 0; i < kPairs; ++i) frequencies[i] = std::pow(1e4, -i / double{kPairs});
    const std::vector<float> digits = make_turns(frequencies);
    std::vector<float> out(2 * kDim);
    for (const bool adjacent : {false, true})
        for (const int offset : {0, 32})
            for (const std::int32_t pos : {-1, 0, 1, 63, 64, 4095, 4096, 300000, 64 * 64 * 64, (1 << 24) - 1}) {
                for (int d = 0; d < kDim; ++d)
                    spread_turn_value(digits.data(), turn_width(kPairs), {kDims, offset, adjacent}, kDim, pos, d, out.data());
                for (int d = 0; d < kDim; ++d) {
                    const int at = d - offset;
                    const bool turned = pos >= 0 && at >= 0 && at < kDims;
                    const double angle = turned ? pos * frequencies[adjacent ? at / 2 : at % kPairs] : 0;
                    EXPECT_NEAR(out[d], std::cos(angle), 1e-6) << "position " << pos << " dim " << d;
                    EXPECT_NEAR(out[kDim + d], std::sin(angle), 1e-6) << "position " << pos << " dim " << d;
                }
            }
}

}  // namespace
}  // namespace turboquant::cuda
