// Formats for a model that was not measured: within the budget, none of it wasted, and as good as the assumptions allow.
#include "turboquant/planner/prior.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <stdexcept>

#include "turboquant/codec/tile.h"
#include "turboquant/planner/sensitivity.h"

namespace turboquant {
namespace {

std::vector<UnmeasuredSlot> model(int layers, int head_dim = 128, int n_heads = 8) {
    std::vector<UnmeasuredSlot> slots;
    for (int l = 0; l < layers; l++)
        for (const Side side : {Side::key, Side::value}) slots.push_back({side, head_dim, n_heads});
    return slots;
}

double bits_of(const std::vector<UnmeasuredSlot>& slots, const std::vector<CodecId>& formats) {
    double bits = 0, values = 0;
    for (std::size_t i = 0; i < slots.size(); i++) {
        const double n = static_cast<double>(slots[i].head_dim) * slots[i].n_heads * static_cast<double>(slots[i].n_cells);
        bits += n * bits_per_value(formats[i], slots[i].head_dim), values += n;
    }
    return bits / values;
}

TEST(Prior, SpendsTheBudgetAndNoMore) {
    for (const int layers : {1, 8, 32, 61})
        for (const int head_dim : {64, 128})
            for (const double bits : {2.4, 3.25, 4.25, 5.5}) {
                const auto slots = model(layers, head_dim);
                const double used = bits_of(slots, unmeasured_formats(slots, bits, true));
                EXPECT_LE(used, bits + 1e-9) << layers << " layers";
                EXPECT_GT(used, bits - 1.0001 / (2 * layers)) << layers << " layers: one more bit for one slot would fit";
            }
}

TEST(Prior, TrellisFormatsOfTheBudgetsBits) {
    for (const CodecId id : unmeasured_formats(model(8), 3.125, true)) EXPECT_EQ(id, CodecId::tcq3);
    for (const CodecId id : unmeasured_formats(model(8), 4.125, true)) EXPECT_EQ(id, CodecId::tcq4);
}

TEST(Prior, WhatIsLeftGoesToTheOutermostLayersAndToKeysFirst) {
    const auto slots = model(8);
    const auto formats = unmeasured_formats(slots, 3.125 + 3.0 / 16, true);  // three slots get a bit more
    for (std::size_t i = 0; i < slots.size(); i++) {
        const bool better = i == 0 || i == 14 || i == 1 || i == 15 ? formats[i] == CodecId::tcq4 : false;
        EXPECT_EQ(formats[i] == CodecId::tcq4, better) << i;
    }
    EXPECT_EQ(formats[0], CodecId::tcq4);
    EXPECT_EQ(formats[14], CodecId::tcq4);
}

TEST(Prior, KeysWithTheirOffsetGetMore) {
    const auto slots = model(8);
    const auto better = [&](bool offset_removed) {
        std::map<Side, int> n;
        const auto formats = unmeasured_formats(slots, 3.125 + 7.0 / 16, offset_removed);
        for (std::size_t i = 0; i < slots.size(); i++) n[slots[i].side] += formats[i] == CodecId::tcq4;
        return n;
    };
    EXPECT_EQ(better(false), (std::map<Side, int>{{Side::key, 7}, {Side::value, 0}}));
    EXPECT_EQ(better(true), (std::map<Side, int>{{Side::key, 4}, {Side::value, 3}}));
}

TEST(Prior, KeysOfDeepModelsGetMore) {
    EXPECT_EQ(key_weight(8, true), 1);
    EXPECT_EQ(key_weight(28, true), key_weight(16, true));
    EXPECT_GT(key_weight(12, true), 1.5);
    EXPECT_LT(key_weight(12, true), key_weight(16, true));
    EXPECT_GT(key_weight(28, false), key_weight(28, true));
    for (const double bits : {2.25, 3.25, 4.25}) {
        const auto slots = model(28);
        const auto formats = unmeasured_formats(slots, bits, true);
        double k = 0, v = 0;
        for (std::size_t i = 0; i < slots.size(); i++) (slots[i].side == Side::key ? k : v) += codec_info(formats[i]).bits / 28.0;
        EXPECT_GT(k - v, 0.9) << bits;
        EXPECT_LT(k - v, 2.1) << bits;
    }
}

TEST(Prior, KeysOfGlobalLayersAmongSlidingOnesGetMore) {
    // Gemma-3-270M: three of eighteen layers see the whole context.
    const auto keys = [](std::int64_t global_cells, double bits) {
        auto slots = model(18, 256, 1);
        for (std::size_t i = 0; i < slots.size(); i++) slots[i].n_cells = i / 2 % 6 == 5 ? global_cells : 1024;
        const auto formats = unmeasured_formats(slots, bits, true);
        const double used = bits_of(slots, formats);
        EXPECT_LE(used, bits + 1e-9);
        EXPECT_GT(used, bits - 2.0 * static_cast<double>(global_cells) / (2.0 * (15 * 1024 + 3 * static_cast<double>(global_cells))));
        std::map<bool, double> mean;
        for (std::size_t i = 0; i < slots.size(); i += 2)
            mean[i / 2 % 6 == 5] += codec_info(formats[i]).bits / (i / 2 % 6 == 5 ? 3.0 : 15.0);
        return mean;
    };
    for (const double bits : {2.07, 3.07, 4.07}) {  // of 2.25, 3.25, 4.25, for codes
        auto even = keys(1024, bits);
        EXPECT_LE(std::abs(even[true] - even[false]), 1) << bits << ": all alike";
        auto twice = keys(2048, bits);
        EXPECT_GE(twice[true] - twice[false], 0.9) << bits;
        EXPECT_LE(twice[true] - twice[false], 3) << bits;
        // They are most of a long context's cache, and cannot have much more than the budget.
        auto much = keys(32768, bits);
        EXPECT_LE(much[true], bits + 2) << bits;
    }
}

TEST(Prior, UnevenModelsAreWeighedByTheirSize) {
    // One layer of 32 heads beside seven of one: the big one cannot have what the small ones get.
    auto slots = model(8, 64, 1);
    slots[0].n_heads = slots[1].n_heads = 32;
    const auto formats = unmeasured_formats(slots, 3.3, true);
    EXPECT_LE(bits_of(slots, formats), 3.3);
    EXPECT_GT(bits_of(slots, formats), 3.2);
}

TEST(Prior, CandidatesStayNearTheBudget) {
    for (const CodecId id : unmeasured_candidates(3.25)) {
        EXPECT_LE(bits_per_value(id, 128), 5.5);
        EXPECT_FALSE(is_composite(id));
    }
    EXPECT_TRUE(unmeasured_candidates(-2).empty());
    EXPECT_THROW(unmeasured_formats(model(2), 1.0, true), std::invalid_argument);
    EXPECT_THROW(unmeasured_formats(model(2, 100), 4.25, true), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
