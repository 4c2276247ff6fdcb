#include "turboquant/codec/rotation.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numbers>
#include <stdexcept>

#include "support.h"

namespace turboquant {
namespace {

// Dense matrix of the definition: S2 * (DHT (x) WHT) * S1.
double entry(const Rotation& r, int row, int col) {
    const int l = row / r.pow2(), j = col / r.pow2(), parity = std::popcount(static_cast<unsigned>(row % r.pow2() & col % r.pow2())) % 2;
    const double angle = 2 * std::numbers::pi * l * j / r.odd();
    return r.signs_out()[row] * r.signs_in()[col] * (parity ? -1 : 1) * (std::cos(angle) + std::sin(angle)) / std::sqrt(r.head_dim());
}

TEST(Rotation, IsTheDocumentedMatrixAndOrthonormal) {
    for (int d : kHeadDims) {
        const Rotation& r = rotation_for(d);
        ASSERT_EQ(r.pow2() * r.odd(), d);
        ASSERT_EQ(r.odd() % 2, 1);
        std::vector<std::vector<float>> columns(d, std::vector<float>(d));
        double worst_entry = 0, worst_dot = 0, peak = 0;
        for (int c = 0; c < d; ++c) {
            columns[c][c] = 1;
            r.forward(columns[c]);
            for (int i = 0; i < d; ++i) {
                worst_entry = std::max(worst_entry, std::abs(columns[c][i] - entry(r, i, c)));
                peak = std::max(peak, std::abs(static_cast<double>(columns[c][i])));
            }
        }
        for (int a = 0; a < d; ++a)
            for (int b = 0; b <= a; ++b) worst_dot = std::max(worst_dot, std::abs(test::dot(columns[a], columns[b]) - (a == b)));
        EXPECT_LT(worst_entry, 1e-6) << d;
        EXPECT_LT(worst_dot, 1e-6) << d;
        // An impulse spreads over all coordinates: none holds more than twice its share of the energy.
        EXPECT_LE(peak, std::sqrt(2.0 / d) + 1e-6) << d;
        EXPECT_GE(peak, std::sqrt(1.0 / d) - 1e-6) << d;
    }
}

TEST(Rotation, InverseUndoesForwardAndInnerProductsStay) {
    SplitMix64 random(1);
    for (int d : kHeadDims) {
        const Rotation& r = rotation_for(d);
        const std::vector<float> x = test::gaussian(random, d), y = test::gaussian(random, d);
        std::vector<float> rx = x, ry = y;
        r.forward(rx);
        r.forward(ry);
        EXPECT_NEAR(test::dot(rx, ry), test::dot(x, y), 1e-4);
        EXPECT_GT(test::relative_error(x, rx), 0.5) << "the rotation does nothing";
        r.inverse(rx);
        for (int i = 0; i < d; ++i) EXPECT_NEAR(rx[i], x[i], 3e-6);
    }
}

std::vector<std::uint8_t> packed_signs(const Rotation& r) {
    std::vector<std::uint8_t> bytes(r.head_dim() / 4);
    for (int i = 0; i < 2 * r.head_dim(); ++i) {
        const float s = i < r.head_dim() ? r.signs_in()[i] : r.signs_out()[i - r.head_dim()];
        EXPECT_EQ(std::abs(s), 1.f);
        bytes[i / 8] = static_cast<std::uint8_t>(bytes[i / 8] | (s > 0) << (i % 8));
    }
    return bytes;
}

// The signs are part of the saved format: they may never change.
TEST(Rotation, SignsArePinned) {
    EXPECT_EQ(test::hex(packed_signs(rotation_for(64))), "b1c1e5f1b4d48b4f18f3fa1040a887f4");
    const std::uint64_t pinned[] = {0xaaa39a10cbc83bd3, 0x3c5044c644335a20, 0x80f54c2d10881620, 0xac2026a388b547f9, 0x9ee3c6041baeefb1,
                                    0xe001b0116e8a078f, 0x0ee57f2fc548cd6d, 0x6e912d85e846e7ba, 0x25d99c82a08bb1e1};
    for (std::size_t i = 0; i < std::size(kHeadDims); ++i)
        EXPECT_EQ(test::hash(packed_signs(rotation_for(kHeadDims[i]))), pinned[i]) << kHeadDims[i];
    EXPECT_NE(test::hash(packed_signs(Rotation(128, 43))), pinned[4]);
}

TEST(Rotation, PartsOfAnySizeAreRotated) {
    SplitMix64 random(4);
    for (int n : {1, 2, 31, 45, 103, 122, 127}) {
        const Rotation& r = part_rotation_for(n);
        ASSERT_EQ(r.pow2() * r.odd(), n);
        const std::vector<float> x = test::gaussian(random, n);
        std::vector<float> y = x, columns;
        r.forward(y);
        EXPECT_NEAR(test::dot(y, y), test::dot(x, x), 2e-6 * test::dot(x, x)) << n;
        if (n > 30) {
            // An impulse spreads over all coordinates.
            std::vector<float> impulse(n);
            impulse[n / 3] = 1;
            r.forward(impulse);
            for (float v : impulse) EXPECT_LE(v * v, 2.0 / n + 1e-6) << n;
        }
        // Column l is y times l - 10.
        for (int i = 0; i < n; ++i)
            for (int l = 0; l < Rotation::kLanes; ++l) columns.push_back(y[i] * static_cast<float>(l - 10));
        r.inverse_columns(columns);
        for (int i = 0; i < n; ++i)
            for (int l = 0; l < Rotation::kLanes; ++l) ASSERT_NEAR(columns[i * Rotation::kLanes + l], x[i] * (l - 10), 1e-4) << n;
    }
    EXPECT_EQ(&part_rotation_for(45), &part_rotation_for(45));
}

TEST(Rotation, RejectsOtherSizes) {
    for (int d : {0, -64, 1, 63, 100, 1024}) EXPECT_THROW(rotation_for(d), std::invalid_argument);
    for (int d : {0, -64}) {
        EXPECT_THROW(Rotation r(d), std::invalid_argument);
        EXPECT_THROW(part_rotation_for(d), std::invalid_argument);
    }
    std::vector<float> wrong(127);
    EXPECT_THROW(rotation_for(128).forward(wrong), std::invalid_argument);
    EXPECT_THROW(rotation_for(128).inverse(wrong), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
