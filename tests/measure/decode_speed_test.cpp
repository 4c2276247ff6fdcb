#include "turboquant/measure/decode_speed.h"

#include <gtest/gtest.h>

namespace turboquant::measure {
namespace {

TEST(DecodeSpeed, DefaultDepthsLeaveRoomForTheTimedTokens) {
    EXPECT_EQ(default_depths(2048), (std::vector<int>{0, 512, 1024, 2048 - kTimedTokens}));
    EXPECT_EQ(default_depths(64), (std::vector<int>{0, 16, 32}));
    EXPECT_EQ(default_depths(8), (std::vector<int>{0}));
}

}  // namespace
}  // namespace turboquant::measure
