#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "support.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

// The definition, in arithmetic instead of bit fields.
double value_of(std::uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const double magnitude = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, AllFiniteValuesRoundTrip) {
    for (unsigned h = 0; h < 0x10000; ++h) {
        if ((h >> 10 & 31) == 31) continue;
        const auto half = static_cast<std::uint16_t>(h);
        ASSERT_EQ(static_cast<double>(from_half(half)), value_of(half));
        ASSERT_EQ(to_half(from_half(half)), half);
    }
}

TEST(Half, RoundsToNearestEven) {
    for (std::uint16_t h = 0; h < 0x7bff; ++h) {
        const double lo = value_of(h), hi = value_of(static_cast<std::uint16_t>(h + 1));
        const auto middle = static_cast<float>((lo + hi) / 2);  // exact
        const auto even = static_cast<std::uint16_t>(h + h % 2);
        ASSERT_EQ(to_half(middle), even) << h;
        ASSERT_EQ(to_half(-middle), even | 0x8000) << h;
        ASSERT_EQ(to_half(std::nextafter(middle, 0.f)), h) << h;
        ASSERT_EQ(to_half(std::nextafter(middle, 1e9f)), h + 1) << h;
    }
}

TEST(Half, OverflowSaturatesAndNaNStays) {
    const float inf = std::numeric_limits<float>::infinity();
    for (float x : {65504.f, 65519.f, 65520.f, 1e6f, std::numeric_limits<float>::max(), inf}) {
        EXPECT_EQ(to_half(x), 0x7bff) << x;
        EXPECT_EQ(to_half(-x), 0xfbff) << x;
    }
    EXPECT_EQ(to_half(1e-30f), 0);
    EXPECT_EQ(to_half(std::numeric_limits<float>::denorm_min()), 0);
    EXPECT_TRUE(std::isnan(from_half(to_half(std::nanf("")))));
    EXPECT_EQ(from_half(0x7c00), inf);
    EXPECT_EQ(from_half(0xfc00), -inf);
}

}  // namespace
}  // namespace turboquant
