#include "turboquant/cache/rope.h"

#include <gtest/gtest.h>

#include <cmath>

using namespace turboquant;

namespace {
std::vector<float> rotated(const RopeParams& p, float pos, std::vector<float> x) {
    std::vector<float> table(p.n_dims);
    rope_table(p, pos, table);
    rope_apply(p, table, x);
    return x;
}
}  // namespace

TEST(Rope, PairsByHand) {
    RopeParams p;
    p.n_dims = 4;
    p.freq_base = 100;  // angles: pos, pos/10
    const std::vector<float> x = {1, 0, 0, 1, 5};
    const auto a = rotated(p, 2, x);
    EXPECT_NEAR(a[0], std::cos(2.0), 1e-6);
    EXPECT_NEAR(a[1], std::sin(2.0), 1e-6);
    EXPECT_NEAR(a[2], -std::sin(0.2), 1e-6);
    EXPECT_NEAR(a[3], std::cos(0.2), 1e-6);
    EXPECT_EQ(a[4], 5) << "dims after n_dims are left alone";
    p.pairs = RopePairs::split;  // pairs (0,2), (1,3)
    const auto s = rotated(p, 2, x);
    EXPECT_NEAR(s[0], std::cos(2.0), 1e-6);
    EXPECT_NEAR(s[2], std::sin(2.0), 1e-6);
    EXPECT_NEAR(s[1], -std::sin(0.2), 1e-6);
    EXPECT_NEAR(s[3], std::cos(0.2), 1e-6);
}

TEST(Rope, RotationsAddUp) {
    RopeParams p;
    p.n_dims = 64;
    std::vector<float> x(64);
    for (int i = 0; i < 64; i++) x[i] = std::sin(static_cast<float>(3 * i));
    const auto once = rotated(p, 37 - 12, x), twice = rotated(p, -12, rotated(p, 37, x));
    for (int i = 0; i < 64; i++) EXPECT_NEAR(once[i], twice[i], 1e-4);
}

TEST(Rope, FreqFactorsAndYarn) {
    RopeParams p;
    p.n_dims = 8;
    const std::vector<float> factors = {1, 2, 4, 8};
    p.freq_factors = factors.data();
    std::vector<float> table(8);
    rope_table(p, 3, table);
    EXPECT_NEAR(table[2], std::cos(3 * std::pow(10000.0, -0.25) / 2), 1e-6);
    // YaRN: the fastest pair keeps its angle, the slowest is interpolated, magnitudes grow by 1 + 0.1 ln(1/scale).
    p = {};
    p.n_dims = 64;
    p.n_ctx_orig = 4096;
    p.freq_scale = 0.25f;
    p.ext_factor = 1;
    table.resize(64);
    rope_table(p, 5, table);
    const double m = 1 + 0.1 * std::log(4.0);
    EXPECT_NEAR(table[0], m * std::cos(5.0), 1e-5);
    const double slow = 5 * std::pow(10000.0, -62.0 / 64);
    EXPECT_NEAR(table[63], m * std::sin(0.25 * slow), 1e-6);
}
