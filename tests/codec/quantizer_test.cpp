#include "turboquant/codec/quantizer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "support.h"
#include "turboquant/codec/tile.h"

namespace turboquant {
namespace {

using test::dot, test::gaussian, test::relative_error;

double mean_error(const Quantizer& q, int n, std::uint64_t seed) {
    SplitMix64 random(seed);
    std::vector<float> back(q.head_dim());
    double sum = 0;
    for (int i = 0; i < n; ++i) {
        const std::vector<float> x = gaussian(random, q.head_dim());
        q.dequantize(q.quantize(x), back);
        sum += relative_error(x, back);
    }
    return sum / n;
}

TEST(Quantizer, CorrectedErrorAt128IsWithinTheRequiredBounds) {
    const auto error = [](CodecId id) { return mean_error(Quantizer(id, 128), 4000, 1); };
    const double e2 = error(CodecId::turbo2), e3 = error(CodecId::turbo3), e4 = error(CodecId::turbo4);
    EXPECT_GT(e2, .115);
    EXPECT_LT(e2, .120);
    EXPECT_GT(e3, .0335);
    EXPECT_LT(e3, .0345);
    EXPECT_GT(e4, .0091);
    EXPECT_LT(e4, .0094);
}

// With D the law's error, y the unit vector and c its code: <y,c> ~ |c|^2 ~ 1-D, so the error of y - s*c is D for s = 1,
// 2 - 2 sqrt(1-D) for s = 1/|c| and D/(1-D) for s = 1/<y,c>.
TEST(Quantizer, ErrorFollowsTheLawForAllSizesCodecsAndModes) {
    for (auto [id, d] : test::codecs_and_sizes()) {
        if (!codec_info(id).rotated) continue;
        const bool trellis = codec_info(id).family == Family::trellis;
        constexpr double kTrellisError[] = {0, .2824, .0799, .0218, .00597, .00162};  // measured, see trellis_test.cpp
        const double law = trellis ? kTrellisError[codec_info(id).bits] : codebook_for(codec_info(id).bits, d).mse;
        const double expected[] = {law, 2 - 2 * std::sqrt(1 - law), law / (1 - law)};
        double measured[3];
        for (NormMode mode : {NormMode::plain, NormMode::corrected, NormMode::eden}) {
            const int m = static_cast<int>(mode);
            measured[m] = mean_error(Quantizer(id, d, mode), trellis ? 300 : 1000, 2);  // the search is slow
            // Both corrections also remove the error's part along x, up to 3/d of it at high bits.
            const double ratio = measured[m] / expected[m], radial = mode == NormMode::plain ? 0 : 3.0 / d;
            EXPECT_LT(ratio, 1.04) << codec_info(id).name << " head_dim " << d << " mode " << m;
            EXPECT_GT(ratio, 0.96 - radial) << codec_info(id).name << " head_dim " << d << " mode " << m;
        }
        if (d == 128)
            std::printf("error %-6s law %.6f raw %.6f corrected %.6f eden %.6f\n", codec_info(id).name.data(), law, measured[0],
                        measured[1], measured[2]);
    }
}

TEST(Quantizer, CorrectedKeepsTheNorm) {
    SplitMix64 random(3);
    for (int d : kHeadDims) {
        const Quantizer corrected(CodecId::turbo2, d), raw(CodecId::turbo2, d, NormMode::plain);
        double energy = 0;
        for (int i = 0; i < 100; ++i) {
            const std::vector<float> x = gaussian(random, d);
            std::vector<float> back(d);
            corrected.dequantize(corrected.quantize(x), back);
            EXPECT_NEAR(dot(back, back) / dot(x, x), 1, 2e-3);
            raw.dequantize(raw.quantize(x), back);
            energy += dot(back, back) / dot(x, x) / 100;
        }
        EXPECT_NEAR(energy, 1 - raw.codebook().mse, 0.02) << "raw shrinks, so the check above can fail";
    }
}

// q is correlated with x, as a query is with the keys it attends to: shrinkage then shows as bias.
TEST(Quantizer, EdenIsUnbiasedAndTheOthersAreNot) {
    for (CodecId id : {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4}) {
        const double law = codebook_for(codec_info(id).bits, 128).mse;
        const double expected[] = {-law, std::sqrt(1 - law) - 1, 0};
        for (NormMode mode : {NormMode::plain, NormMode::corrected, NormMode::eden}) {
            const Quantizer quantizer(id, 128, mode);
            SplitMix64 random(4);
            std::vector<float> back(128);
            double sum = 0, squares = 0;
            constexpr int kN = 4000;
            for (int i = 0; i < kN; ++i) {
                const std::vector<float> x = gaussian(random, 128);
                std::vector<float> q = gaussian(random, 128);
                for (int k = 0; k < 128; ++k) q[k] += x[k];
                quantizer.dequantize(quantizer.quantize(x), back);
                const double e = (dot(q, back) - dot(q, x)) / dot(x, x);
                sum += e, squares += e * e;
                // EDEN's scale makes the part along x exact for every single vector (up to fp16), not only in the mean.
                if (mode == NormMode::eden) {
                    ASSERT_NEAR(dot(back, x) / dot(x, x), 1, 6e-4);
                }
            }
            const double mean = sum / kN, sigma = std::sqrt(squares / kN - mean * mean) / std::sqrt(kN);
            EXPECT_NEAR(mean, expected[static_cast<int>(mode)], 4 * sigma) << codec_info(id).name << " mode " << static_cast<int>(mode);
            if (mode == NormMode::plain) {
                EXPECT_LT(mean, -5 * sigma) << "the test cannot see bias";
            }
        }
    }
}

TEST(Quantizer, OutlierChannelsCostNothingBecauseOfTheRotation) {
    SplitMix64 random(5);
    for (int d : kHeadDims) {
        const Quantizer q(CodecId::turbo4, d);
        double rotated = 0, plain = 0;
        constexpr int kN = 200;
        for (int i = 0; i < kN; ++i) {
            std::vector<float> x = gaussian(random, d), back(d);
            for (int k = 0; k < 12; ++k) x[(k * 11 + 3) % d] *= 20;
            q.dequantize(q.quantize(x), back);
            rotated += relative_error(x, back) / kN;
            // The same codebook without rotation.
            const double norm = std::sqrt(dot(x, x));
            for (int k = 0; k < d; ++k) {
                const auto t = static_cast<float>(x[k] / norm);
                back[k] = static_cast<float>(norm * q.codebook().centroids[q.codebook().quantize(t)]);
            }
            plain += relative_error(x, back) / kN;
        }
        EXPECT_NEAR(rotated / q.codebook().mse, 1, 0.15) << d;
        EXPECT_GT(plain / q.codebook().mse, 5) << d << ": the input does not tell a missing rotation";
    }
}

TEST(Quantizer, OneHotIsHardWithoutRotationAndSpreadWithIt) {
    for (int d : kHeadDims) {
        const Quantizer q(CodecId::turbo3, d, NormMode::plain);
        for (int hot : {0, 5, d - 1}) {
            std::vector<float> x(d), back(d);
            x[hot] = -3;
            q.dequantize(q.quantize(x), back);
            EXPECT_LT(relative_error(x, back), 3 * q.codebook().mse) << d;
            EXPECT_GT(std::pow(1 - q.codebook().centroids.back(), 2), 3 * q.codebook().mse) << "a clipped one-hot would pass too";
        }
    }
}

// The 4-bit table that one fork shipped for three months: the bounds above must tell it from a converged one.
TEST(Quantizer, AWrongTableFailsTheBounds) {
    Codebook wrong = codebook_for(4, 128);
    const float old[] = {.006938f, .020989f, .035597f, .051262f, .068756f, .089527f, .117195f, .173926f};
    for (int k = 0; k < 8; ++k) wrong.centroids[8 + k] = old[k], wrong.centroids[7 - k] = -old[k];
    for (int k = 0; k < 15; ++k) wrong.boundaries[k] = (wrong.centroids[k] + wrong.centroids[k + 1]) / 2;
    SplitMix64 random(1);
    double sum = 0;
    for (int i = 0; i < 500; ++i) {
        const std::vector<float> x = gaussian(random, 128);
        const QuantizedVector q = quantize_mse(rotation_for(128), wrong, NormMode::corrected, x);
        std::vector<float> back;
        for (std::uint8_t c : q.codes) back.push_back(wrong.centroids[c] * q.scale);
        rotation_for(128).inverse(back);
        sum += relative_error(x, back) / 500;
    }
    EXPECT_GT(sum, .0094 * 1.5);
    EXPECT_NEAR(sum, .01818, .001);
}

TEST(Quantizer, ExtremeMagnitudes) {
    SplitMix64 random(6);
    const Quantizer q(CodecId::turbo4, 128);
    std::vector<float> zero(128), back(128, 1.f);
    EXPECT_EQ(q.quantize(zero).scale, 0);
    q.dequantize(q.quantize(zero), back);
    EXPECT_EQ(back, zero);
    const std::vector<float> x = gaussian(random, 128);
    for (float factor : {1e-3f, 1e3f}) {  // scale-free as long as fp16 holds the norm well
        std::vector<float> scaled = x;
        for (float& v : scaled) v *= factor;
        EXPECT_EQ(q.quantize(scaled).codes, q.quantize(x).codes);
    }
    std::vector<float> huge(128, std::numeric_limits<float>::max()), tiny(128, std::numeric_limits<float>::denorm_min());
    EXPECT_EQ(q.quantize(huge).scale, 65504);
    EXPECT_EQ(q.quantize(tiny).scale, 0);
}

TEST(Quantizer, RejectsBadInput) {
    const Quantizer q(CodecId::turbo4, 64);
    std::vector<float> x(64, 1.f);
    for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
        x[63] = bad;
        EXPECT_THROW(q.quantize(x), std::domain_error);
        for (CodecId id : {CodecId::turbo4, CodecId::raw}) {
            const TileShape shape{id, Side::key, 64};
            std::vector<std::uint8_t> tile(tile_bytes(shape)), before = tile;
            EXPECT_THROW(tile_encode(shape, tile.data(), 0, x), std::domain_error);
            EXPECT_EQ(tile, before);
        }
    }
    EXPECT_THROW(q.quantize(std::vector<float>(65)), std::invalid_argument);
    EXPECT_THROW(Quantizer(CodecId::raw, 64), std::invalid_argument);
    EXPECT_THROW(Quantizer(CodecId::turbo4, 100), std::invalid_argument);
    QuantizedVector v{std::vector<std::uint8_t>(64, 16), 1};
    EXPECT_THROW(q.dequantize(v, x), std::invalid_argument);
    v.codes.resize(63);
    EXPECT_THROW(q.dequantize(v, x), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
