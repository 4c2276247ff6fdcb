// Errors of codecs, and the curve from error to divergence.
#include "turboquant/planner/sensitivity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "turboquant/codec/codebook.h"

namespace turboquant {
namespace {

TEST(RelativeMse, FollowsTheCodebooksLaw) {
    for (const int d : {64, 80, 128})
        for (const CodecId id : {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4, CodecId::turbo5}) {
            // Norm correction makes it 2 - 2 sqrt(1 - D); 256 vectors tell it to some per cent.
            const double law = codebook_for(codec_info(id).bits, d).mse, expected = 2 - 2 * std::sqrt(1 - law);
            EXPECT_GT(relative_mse(id, Side::key, d), 0.95 * expected) << codec_info(id).name << " " << d;
            EXPECT_LT(relative_mse(id, Side::key, d), 1.05 * expected) << codec_info(id).name << " " << d;
        }
}

TEST(RelativeMse, EveryCodecOfEveryHeadSizeIsOrderedByBits) {
    for (const CodecInfo& c : kCodecs) {
        if (is_composite(c.id)) {
            EXPECT_THROW(relative_mse(c.id, Side::key, 128), std::invalid_argument);
            continue;
        }
        const double mse = relative_mse(c.id, Side::key, 96);
        // Between the rate-distortion bound 4^-bits and the high-resolution law of scalar quantizers (Panter and Dite 1951).
        if (c.id == CodecId::raw) continue;
        EXPECT_GT(mse, std::pow(4.0, -c.bits)) << c.name;
        EXPECT_LT(mse, 2.73 * std::pow(4.0, -c.bits)) << c.name;
    }
    // Values have the unbiased scale, whose error is D/(1-D) instead of 2 - 2 sqrt(1-D).
    EXPECT_NEAR(relative_mse(CodecId::turbo2, Side::value, 128) / relative_mse(CodecId::turbo2, Side::key, 128), 1.10, 0.03);
    EXPECT_LT(relative_mse(CodecId::raw, Side::key, 128), 1e-6);
    EXPECT_EQ(relative_mse(CodecId::turbo3, Side::key, 128), relative_mse(CodecId::turbo3, Side::key, 128));
}

TEST(CostCurve, ProportionalOutsidePowerLawBetween) {
    const CostCurve curve({{0.01, 0.002}, {0.1, 0.04}});
    EXPECT_DOUBLE_EQ(curve.at(0.01), 0.002);
    EXPECT_DOUBLE_EQ(curve.at(0.1), 0.04);
    EXPECT_DOUBLE_EQ(curve.at(0.001), 0.0002);
    EXPECT_DOUBLE_EQ(curve.at(0), 0);
    EXPECT_DOUBLE_EQ(curve.at(0.2), 0.08);
    EXPECT_NEAR(curve.at(std::sqrt(0.001)), std::sqrt(0.002 * 0.04), 1e-12);
    EXPECT_NEAR(CostCurve({{0.1, 0.3}}).at(0.01), 0.03, 1e-12);
}

TEST(CostCurve, NoiseNeverMakesABetterFormatCostMore) {
    const CostCurve curve({{0.1, 0.001}, {0.01, 0.002}, {0.001, -1e-5}});
    double before = 0;
    for (double mse = 1e-4; mse < 1; mse *= 1.1) {
        EXPECT_GE(curve.at(mse), before);
        before = curve.at(mse);
    }
    EXPECT_GT(before, 0);
}

TEST(CostCurve, RefusesWhatIsNoMeasurement) {
    EXPECT_THROW(CostCurve({}), std::invalid_argument);
    EXPECT_THROW(CostCurve({{0, 1}}), std::invalid_argument);
    EXPECT_THROW(CostCurve({{0.1, 1}, {0.1, 2}}), std::invalid_argument);
    EXPECT_THROW(CostCurve({{0.1, std::numeric_limits<double>::quiet_NaN()}}), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
