#include "turboquant/cache/positions.h"

#include <gtest/gtest.h>

using namespace turboquant;

namespace {
void place(CellPositions& p, std::vector<std::int64_t> rows, std::vector<std::int32_t> pos) { p.place(rows, pos); }
}  // namespace

TEST(Positions, SequencesKeepTheirOffsets) {
    CellPositions p(64, 1);
    place(p, {0, 1, 2}, {0, 1, 2});
    place(p, {3, 4, 5}, {0, 1, 2});  // a second prompt in the same cache
    const int a = p.offset_id(0), b = p.offset_id(3);
    EXPECT_NE(a, b);
    EXPECT_EQ(p.offset_id(2), a);
    EXPECT_EQ(p.offset_id(5), b);
    // Both go on, interleaved, always in the same order, though equally long.
    for (int i = 0; i < 5; i++) {
        place(p, {6 + 2 * i, 7 + 2 * i}, {3 + i, 3 + i});
        EXPECT_EQ(p.offset_id(6 + 2 * i), a);
        EXPECT_EQ(p.offset_id(7 + 2 * i), b);
    }
    // Prompts of several sequences in one batch.
    place(p, {20, 21, 22, 23}, {0, 1, 0, 1});
    EXPECT_EQ(p.offset_id(20), p.offset_id(21));
    EXPECT_NE(p.offset_id(20), p.offset_id(22));
    EXPECT_EQ(p.offset_id(22), p.offset_id(23));
}

TEST(Positions, ASequenceCutBackGoesOnWithItsOffset) {
    CellPositions p(64, 1);
    place(p, {0, 1, 2, 3}, {0, 1, 2, 3});
    place(p, {2}, {2});
    EXPECT_EQ(p.offset_id(2), p.offset_id(1));
    EXPECT_EQ(p.generation(p.offset_id(2)), p.generation(p.offset_id(1)));
}

TEST(Positions, ASequenceWithoutCellsDoesNotGoOn) {
    CellPositions p(64, 1);
    place(p, {0}, {0});
    const int gone = p.offset_id(0);
    place(p, {0}, {0});  // the cache was cleared without a word (llama-bench's warm-up), and another sequence begins
    place(p, {1}, {1});
    EXPECT_NE(p.offset_id(0), gone);
    EXPECT_EQ(p.offset_id(1), p.offset_id(0));
}

TEST(Positions, StreamsDoNotMix) {
    CellPositions p(64, 2);
    place(p, {0, 1}, {0, 1});
    place(p, {64, 65}, {0, 1});
    place(p, {66}, {2});
    EXPECT_EQ(p.offset_id(66), p.offset_id(65));
    EXPECT_NE(p.offset_id(66), p.offset_id(1));
}

TEST(Positions, IdsComeBackWhenNoCellHasThem) {
    CellPositions p(128, 1);
    std::vector<std::uint32_t> generations;
    for (int i = 0; i < 1000; i++) {
        place(p, {i % 128}, {0});
        generations.push_back(p.generation(p.offset_id(i % 128)));
    }
    EXPECT_GT(generations.back(), 1u);
    p.clear();
    EXPECT_EQ(p.at(5), -1);
}

TEST(Positions, RestoredCellsShareAnIdByName) {
    CellPositions p(64, 1);
    const int a = p.restore(0, 10, {-1, 7}, -1), b = p.restore(1, 11, {-1, 7}, -1), c = p.restore(2, 5, {-1, 8}, -1);
    EXPECT_EQ(a, b);
    EXPECT_NE(a, c);
    place(p, {3}, {12});
    EXPECT_EQ(p.offset_id(3), a) << "the restored sequence goes on";
    EXPECT_EQ(p.restore(4, 20, {-1, 9}, c), c) << "an offset that is known already";
}

TEST(Positions, ShiftMovesOncePerContextShiftHoweverManyLayersSeeIt) {
    CellPositions p(4, 1);
    place(p, {0, 1, 2}, {10, 11, 12});
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
    place(p, {0, 2}, {7, 9});
    p.copy_stream(0, 1);
    EXPECT_EQ(p.at(3), 7);
    EXPECT_EQ(p.at(4), -1);
    EXPECT_EQ(p.at(5), 9);
}
