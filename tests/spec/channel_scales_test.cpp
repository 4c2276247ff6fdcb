// Channel scales as letters.
#include "turboquant/spec/channel_scales.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

namespace turboquant {
namespace {

TEST(ChannelScales, LettersArePinned) {
    const std::vector<float> s = parse_scales("aibZSAz");
    EXPECT_EQ(s[0], 1.0f);
    EXPECT_EQ(s[1], 2.0f);
    EXPECT_FLOAT_EQ(s[2], std::exp2(0.125f));
    EXPECT_FLOAT_EQ(s[3], std::exp2(-0.125f));
    EXPECT_EQ(s[4], 0.5f);
    EXPECT_FLOAT_EQ(s[5], std::exp2(-3.25f));
    EXPECT_FLOAT_EQ(s[6], std::exp2(3.125f));
}

TEST(ChannelScales, RoundTripOfEveryLetter) {
    std::string all;
    for (char c = 'A'; c <= 'Z'; c++) all += c;
    for (char c = 'a'; c <= 'z'; c++) all += c;
    const std::vector<float> s = parse_scales(all);
    EXPECT_EQ(scale_letters(s), all);
    for (std::size_t i = 1; i < s.size(); i++) EXPECT_GT(s[i], s[i - 1]);
    EXPECT_EQ(scale_letters(std::vector<float>{1e-20f, 1e20f, 1.04f, 1.05f}), "Azab") << "clipped at the ends, else the nearest";
}

TEST(ChannelScales, OtherCharactersAreRefused) {
    for (const char* bad : {"a1", "a b", "[", "`", "\xe4"}) EXPECT_THROW(parse_scales(bad), std::invalid_argument) << bad;
    EXPECT_TRUE(parse_scales("").empty());
}

}  // namespace
}  // namespace turboquant
