#include "turboquant/cache/saved_row.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "turboquant/codec/quantizer.h"

using namespace turboquant;

namespace {
std::vector<std::uint16_t> random_halves(std::size_t n, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> x(n);
    for (auto& h : x) h = to_half(normal(rng));
    return x;
}
}  // namespace

TEST(SavedRow, TagRidesInTheLastBit) {
    for (const std::int32_t pos : {0, 1, 4095, 131071, 0x7fffffff})
        for (const bool frozen : {false, true}) {
            auto row = random_halves(128, 1);
            const auto before = row, mu = random_halves(128, 2);
            tag_row(row, {pos, frozen}, mu);
            EXPECT_EQ(read_tag(row).pos, pos);
            EXPECT_EQ(read_tag(row).frozen, frozen);
            for (std::size_t i = 0; i < row.size(); i++) EXPECT_LE(std::abs(row[i] - before[i]), 1) << "more than one unit in the last place";
            const auto tagged = row;
            tag_row(row, {pos, frozen}, mu);
            EXPECT_EQ(row, tagged) << "tagging twice changes nothing";
        }
}

TEST(SavedRow, ForeignRowsHaveNone) {
    std::mt19937 rng(2);
    std::vector<std::uint16_t> row(128);
    for (int trial = 0; trial < 2000; trial++) {
        for (auto& h : row) h = static_cast<std::uint16_t>(rng());
        EXPECT_EQ(read_tag(row).pos, -1);
    }
    EXPECT_EQ(read_tag(std::vector<std::uint16_t>(64, 0)).pos, -1) << "an unwritten row must not look like position 0";
    EXPECT_EQ(read_tag(std::vector<std::uint16_t>(32, 0)).pos, -1);
}

TEST(SavedRow, OffsetTravelsInPieces) {
    for (const std::size_t n_embd : {80u, 128u, 256u, 1024u}) {
        const int pieces = mu_pieces(n_embd);
        ASSERT_GT(pieces, 0);
        const auto mu = random_halves(n_embd, 3);
        MuPieces collected(n_embd);
        for (int i = 0; i < pieces; i++) {
            EXPECT_FALSE(collected.complete()) << n_embd;
            auto row = random_halves(n_embd, 10 + i);
            tag_row(row, {1000 + i, true}, mu);
            collected.add(row, read_tag(row));
        }
        ASSERT_TRUE(collected.complete()) << n_embd;
        EXPECT_EQ(*collected.complete(), mu);
    }
    EXPECT_EQ(mu_pieces(64), 0);
    EXPECT_FALSE(MuPieces(64).complete());
}
