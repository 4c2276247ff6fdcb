// Scales of key channels: the optimum, and that a real codec's score error follows the formula.
#include "turboquant/planner/key_balance.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

constexpr int kDim = 64;

struct Head {
    std::vector<double> variance = std::vector<double>(kDim), energy = std::vector<double>(kDim);
    std::vector<std::pair<int, int>> pairs;
};

/// Keys strong where queries are weak: a head for which balancing pays.
Head head() {
    Head h;
    for (int i = 0; i < kDim; i++) h.variance[i] = i % 4 < 2 ? 4 : 0.25, h.energy[i] = i % 4 < 2 ? 0.5 : 2 + 0.1 * (i % 2);
    for (int i = 0; i < kDim; i += 2) h.pairs.emplace_back(i, i + 1);
    return h;
}

/// What is left of the mean squared score error with these scales: 1 without effect, below 1 where they help.
double balance_gain(std::span<const double> variance, std::span<const double> energy, std::span<const float> scales) {
    double k = 0, q = 0, scaled_k = 0, scaled_q = 0;
    for (std::size_t i = 0; i < scales.size(); i++) {
        const double s2 = static_cast<double>(scales[i]) * scales[i];
        k += variance[i], q += energy[i], scaled_k += variance[i] * s2, scaled_q += energy[i] / s2;
    }
    return k > 0 && q > 0 ? scaled_k * scaled_q / (k * q) : 1;
}

TEST(KeyBalance, IsTheOptimumAmongTiedScales) {
    const Head h = head();
    const std::vector<float> s = balance_keys(h.variance, h.energy, h.pairs);
    const double best = balance_gain(h.variance, h.energy, s);
    EXPECT_LT(best, 0.7);
    double log_sum = 0;
    for (int i = 0; i < kDim; i += 2) {
        EXPECT_EQ(s[i], s[i + 1]) << "RoPE mixes them";
        log_sum += std::log(s[i]);
    }
    EXPECT_NEAR(log_sum, 0, 1e-4);
    std::mt19937 rng(1);
    std::normal_distribution<float> normal(0, 0.2f);
    for (int trial = 0; trial < 100; trial++) {
        std::vector<float> other = s;
        for (int i = 0; i < kDim; i += 2) other[i] = other[i + 1] = s[i] * std::exp(normal(rng));
        EXPECT_GT(balance_gain(h.variance, h.energy, other), best);
    }
}

TEST(KeyBalance, NothingToBalanceOrNothingKnownIsNoScale) {
    const std::vector<double> flat(kDim, 2.0), none(kDim, 0.0), bad(kDim, std::numeric_limits<double>::quiet_NaN());
    for (const auto& [k, q] :
         {std::pair(flat, flat), std::pair(none, flat), std::pair(flat, none), std::pair(bad, flat), std::pair(flat, bad)})
        for (const float s : balance_keys(k, q, {})) EXPECT_NEAR(s, 1, 1e-6);
    std::vector<double> dead = flat;
    dead[3] = 0;
    for (const float s : balance_keys(dead, flat, {})) EXPECT_TRUE(std::isfinite(s) && s > 0) << "a channel that is always zero";
}

/// Mean squared error of q.k with k in turbo3, scaled or not.
double score_error(const Head& h, const std::vector<float>& s) {
    std::mt19937 rng(2);
    std::normal_distribution<double> normal;
    double error = 0;
    const Quantizer quantizer(CodecId::turbo3, kDim);
    for (int trial = 0; trial < 4000; trial++) {
        std::vector<float> k(kDim), out(kDim);
        double exact = 0, got = 0;
        std::vector<double> q(kDim);
        for (int i = 0; i < kDim; i++) {
            k[i] = static_cast<float>(std::sqrt(h.variance[i]) * normal(rng));
            q[i] = std::sqrt(h.energy[i]) * normal(rng);
            exact += q[i] * k[i];
            k[i] *= s[i];
        }
        quantizer.dequantize(quantizer.quantize(k), out);
        for (int i = 0; i < kDim; i++) got += q[i] / s[i] * out[i];
        error += (got - exact) * (got - exact);
    }
    return error;
}

TEST(KeyBalance, TheFormulaHoldsForARealCodec) {
    const Head h = head();
    const std::vector<float> s = balance_keys(h.variance, h.energy, h.pairs), one(kDim, 1.0f);
    EXPECT_NEAR(score_error(h, s) / score_error(h, one), balance_gain(h.variance, h.energy, s), 0.06);
}

}  // namespace
}  // namespace turboquant
