#include "turboquant/cache/positions.h"

#include <gtest/gtest.h>

using namespace turboquant;

TEST(Positions, ShiftMovesOncePerContextShiftHoweverManyLayersSeeIt) {
    CellPositions p(4, 1);
    for (int i = 0; i < 3; i++) p.set(i, i + 10);
    const std::vector<std::int32_t> delta = {-5, -5, 0, -5};
    std::uint64_t layer0 = 0, layer1 = 0;
    p.shift(delta, layer0);
    p.shift(delta, layer1);
    EXPECT_EQ(p.at(0), 5);
    EXPECT_EQ(p.at(1), 6);
    EXPECT_EQ(p.at(2), 12);
    EXPECT_EQ(p.at(3), -1);
    p.shift(delta, layer0);
    EXPECT_EQ(p.at(0), 0);
}

TEST(Positions, CopyStream) {
    CellPositions p(3, 2);
    p.set(0, 7), p.set(2, 9);
    p.copy_stream(0, 1);
    EXPECT_EQ(p.at(3), 7);
    EXPECT_EQ(p.at(4), -1);
    EXPECT_EQ(p.at(5), 9);
}
