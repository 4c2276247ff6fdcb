#include "turboquant/cache/positions.h"

#include <gtest/gtest.h>

#include <random>

#include "turboquant/codec/quantizer.h"

using namespace turboquant;

TEST(Positions, RideInSavedRows) {
    std::mt19937 rng(1);
    for (const std::int32_t pos : {0, 1, 4095, 131071, 0x7fffffff}) {
        std::vector<std::uint16_t> row(64);
        for (auto& h : row) h = to_half(std::normal_distribution<float>()(rng));
        const auto before = row;
        embed_position(row, pos);
        EXPECT_EQ(extract_position(row), pos);
        for (std::size_t i = 0; i < row.size(); i++) EXPECT_LE(std::abs(row[i] - before[i]), 1) << "more than one unit in the last place";
    }
}

TEST(Positions, ForeignRowsHaveNone) {
    std::mt19937 rng(2);
    std::vector<std::uint16_t> row(128);
    for (int trial = 0; trial < 1000; trial++) {
        for (auto& h : row) h = static_cast<std::uint16_t>(rng());
        EXPECT_EQ(extract_position(row), -1);
    }
    EXPECT_EQ(extract_position(std::vector<std::uint16_t>(64, 0)), -1) << "an unwritten row must not look like position 0";
    EXPECT_EQ(extract_position(std::vector<std::uint16_t>(32, 0)), -1);
}

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
