#include "turboquant/codec/prod.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <stdexcept>

#include "support.h"

namespace turboquant {
namespace {

using test::dot, test::gaussian;

struct Statistics {
    double sum = 0, squares = 0;
    int n = 0;

    void add(double e) { sum += e, squares += e * e, ++n; }
    double mean() const { return sum / n; }
    double variance() const { return squares / n - mean() * mean(); }
    double mean_sigma() const { return std::sqrt(variance() / n); }
};

/// Algorithm 2's estimate of <q, x>, term by term: <q, x_mse> + sqrt(pi/2)/d * |r| * <S R q, sign(S r)>.
double estimate(const ProdQuantizer& prod, int bits, std::vector<float> q, const ProdVector& v) {
    const auto d = static_cast<std::size_t>(prod.head_dim());
    const Codebook& book = codebook_for(bits - 1, prod.head_dim());
    prod.rotation().forward(q);
    double mse = 0, sketch = 0;
    for (std::size_t j = 0; j < d; ++j) {
        mse += q[j] * book.centroids[v.mse.codes[j]] * v.mse.scale;
        double s = 0;
        for (std::size_t i = 0; i < d; ++i) s += prod.sketch()[j * d + i] * q[i];
        sketch += v.signs[j] ? s : -s;
    }
    return mse + std::sqrt(std::numbers::pi / 2) / static_cast<double>(d) * v.residual_norm * sketch;
}

// Unbiased over the sketch for one fixed pair: the property that Algorithm 2 is for.
TEST(Prod, InnerProductIsUnbiasedForEveryWidth) {
    for (int bits = 2; bits <= 5; ++bits) {
        SplitMix64 random(1);
        const std::vector<float> x = gaussian(random, 64);
        std::vector<float> q = gaussian(random, 64);
        for (int i = 0; i < 64; ++i) q[i] += x[i];
        Statistics with, without;
        for (int seed = 0; seed < 1000; ++seed) {
            const ProdQuantizer prod(bits, 64, seed);
            ProdVector v = prod.quantize(x);
            with.add(estimate(prod, bits, q, v) - dot(q, x));
            v.residual_norm = 0;  // the MSE part alone
            without.add(estimate(prod, bits, q, v) - dot(q, x));
        }
        EXPECT_LT(std::abs(with.mean()), 4 * with.mean_sigma()) << bits;
        EXPECT_GT(std::abs(without.mean()), 4 * with.mean_sigma()) << bits << ": the test cannot see bias";
    }
}

// Why it is not the default: pi/2 * D(b-1)/D(b) times the variance of the MSE quantizer with all its bits.
TEST(Prod, VarianceIsFourToSixTimesThatOfScaleCorrectedMse) {
    for (int bits = 2; bits <= 4; ++bits) {
        SplitMix64 random(2);
        const CodecId id = bits == 2 ? CodecId::turbo2 : bits == 3 ? CodecId::turbo3 : CodecId::turbo4;
        const Quantizer mse(id, 128);
        Statistics of_mse, of_prod;
        std::vector<float> back(128);
        for (int k = 0; k < 8; ++k) {
            const ProdQuantizer prod(bits, 128, 1000 + k);
            for (int i = 0; i < 500; ++i) {
                const std::vector<float> x = gaussian(random, 128), q = gaussian(random, 128);
                mse.dequantize(mse.quantize(x), back);
                of_mse.add(dot(q, back) - dot(q, x));
                of_prod.add(estimate(prod, bits, q, prod.quantize(x)) - dot(q, x));
            }
        }
        const double ratio = of_prod.variance() / of_mse.variance();
        std::printf("prod: bits %d variance per |q|^2|x|^2/d %.5f, mse %.5f, ratio %.2f\n", bits, of_prod.variance() / 128,
                    of_mse.variance() / 128, ratio);
        EXPECT_GT(ratio, 4) << bits;
        EXPECT_LT(ratio, 6) << bits;
    }
}

TEST(Prod, DenseReconstructionHasTheSameInnerProducts) {
    SplitMix64 random(3);
    for (int d : kHeadDims) {
        const ProdQuantizer prod(3, d);
        const std::vector<float> x = gaussian(random, d), q = gaussian(random, d);
        const ProdVector v = prod.quantize(x);
        std::vector<float> back(d);
        prod.dequantize(v, back);
        EXPECT_NEAR(estimate(prod, 3, q, v), dot(q, back), 1e-3);
        EXPECT_EQ(v.signs.size(), static_cast<std::size_t>(d));
        const double relative = v.residual_norm * v.residual_norm / dot(x, x);
        EXPECT_NEAR(relative / codebook_for(2, d).mse, 1, 0.5) << "the residual is that of bits-1";
    }
}

TEST(Prod, ZeroAndBadInput) {
    const ProdQuantizer prod(3, 64);
    std::vector<float> x(64), back(64, 1.f);
    prod.dequantize(prod.quantize(x), back);
    EXPECT_EQ(back, x);
    x[0] = std::numeric_limits<float>::infinity();
    EXPECT_THROW(prod.quantize(x), std::domain_error);
    EXPECT_THROW(prod.quantize(std::vector<float>(63)), std::invalid_argument);
    EXPECT_THROW(prod.dequantize(ProdVector{}, back), std::invalid_argument);
    EXPECT_THROW(ProdQuantizer(1, 64), std::invalid_argument);
    EXPECT_THROW(ProdQuantizer(6, 64), std::invalid_argument);
    EXPECT_THROW(ProdQuantizer(3, 65), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
