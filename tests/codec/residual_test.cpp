#include "turboquant/codec/residual.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/random.h"

using namespace turboquant;

namespace {

// Of what codes leave of normal vectors, at all head sizes and bits: about what 4 bits leave of a normal variable.
TEST(Residual, LeavesAPercent) {
    for (const CodecId codec :
         {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4, CodecId::tcq1, CodecId::tcq2, CodecId::tcq3, CodecId::tcq5})
        for (const int d : kHeadDims) {
            const Quantizer q(codec, d);
            SplitMix64 random(d);
            double code = 0, left = 0;
            for (int i = 0; i < 60; ++i) {
                std::vector<float> x(d), y(d);
                for (float& f : x) f = static_cast<float>(random.normal());
                q.dequantize_rotated(q.quantize(x), y);
                q.rotation().forward(x);
                for (int k = 0; k < d; ++k) x[k] -= y[k], y[k] = 0, code += std::pow(x[k], 2);
                std::vector<std::uint8_t> row(residual_bytes(d));
                residual_encode(x, row.data());
                residual_add(row.data(), y);
                for (int k = 0; k < d; ++k) left += std::pow(x[k] - y[k], 2);
            }
            EXPECT_LT(left / code, 0.013 + 5e-5 * d) << codec_info(codec).name << ' ' << d << ": the largest of more values is larger";
            EXPECT_GT(left / code, 0.006) << codec_info(codec).name << ' ' << d;
        }
}

TEST(Residual, BytesAreGolden) {
    std::vector<float> x(64), y(64, 1.0f);
    for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i - 20) / 16;
    std::vector<std::uint8_t> row(residual_bytes(64));
    residual_encode(x, row.data());
    std::uint32_t hash = 2166136261u;
    for (const std::uint8_t b : row) hash = (hash ^ b) * 16777619u;
    EXPECT_EQ(row[0], 0xa3) << "dims 0 and 32: -1.25 and 0.75 of 2.6875";
    EXPECT_EQ(row[31], 0xfa) << "dims 31 and 63: 0.6875 and 2.6875";
    EXPECT_EQ(hash, 1938485292u);
    residual_add(row.data(), y);
    EXPECT_NEAR(y[63], 1 + x[63], 0.05);
    EXPECT_NEAR(y[20], 1, 0.15);
}

TEST(Residual, NothingIsNothing) {
    for (const float f : {0.0f, 1e-31f}) {
        std::vector<float> x(128, f), y(128);
        std::vector<std::uint8_t> row(residual_bytes(128), 0xff);
        residual_encode(x, row.data());
        EXPECT_EQ(row, std::vector<std::uint8_t>(residual_bytes(128)));
        residual_add(row.data(), y);
        EXPECT_EQ(y, std::vector<float>(128));
    }
    std::vector<float> x(128, 1);
    x[7] = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::uint8_t> row(residual_bytes(128));
    EXPECT_THROW(residual_encode(x, row.data()), std::domain_error);
}

}  // namespace
