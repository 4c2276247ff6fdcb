// The allocation against brute force.
#include "turboquant/planner/allocate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "turboquant/codec/random.h"

namespace turboquant {
namespace {

using Slots = std::vector<std::vector<SlotOption>>;

/// Least cost over all choices within the budget; infinite if there is none.
double brute_force(const Slots& slots, std::int64_t budget, std::size_t at = 0) {
    if (budget < 0) return HUGE_VAL;
    if (at == slots.size()) return 0;
    double best = HUGE_VAL;
    for (const SlotOption& o : slots[at]) best = std::min(best, o.cost + brute_force(slots, budget - o.size, at + 1));
    return best;
}

std::int64_t total(const Slots& slots, bool largest) {
    std::int64_t sum = 0;
    for (const auto& options : slots) {
        std::int64_t extreme = options[0].size;
        for (const SlotOption& o : options) extreme = largest ? std::max(extreme, o.size) : std::min(extreme, o.size);
        sum += extreme;
    }
    return sum;
}

void expect_consistent(const Slots& slots, std::int64_t budget, const Allocation& a) {
    ASSERT_EQ(a.choice.size(), slots.size());
    std::int64_t size = 0;
    double cost = 0;
    for (std::size_t s = 0; s < slots.size(); s++) size += slots[s].at(a.choice[s]).size, cost += slots[s][a.choice[s]].cost;
    EXPECT_EQ(a.size, size);
    EXPECT_EQ(a.cost, cost);
    EXPECT_LE(a.size, budget);
}

TEST(Allocate, EqualsBruteForceOnRandomProblems) {
    SplitMix64 random(7);
    for (int trial = 0; trial < 300; trial++) {
        Slots slots(1 + random.bits() % 6);
        for (auto& options : slots) {
            options.resize(1 + random.bits() % 5);
            // Sizes and costs without any order: dominated options, equal ones and free ones are among them.
            for (SlotOption& o : options)
                o = {static_cast<std::int64_t>(random.bits() % 40) * (trial % 3 ? 132 : 1), random.uniform() - (trial % 5 == 0)};
        }
        const std::int64_t least = total(slots, false), most = total(slots, true);
        const std::int64_t budget = least + static_cast<std::int64_t>(random.uniform() * static_cast<double>(most - least + 2));
        const Allocation a = allocate(slots, budget);
        expect_consistent(slots, budget, a);
        EXPECT_NEAR(a.cost, brute_force(slots, budget), 1e-12) << "trial " << trial;
    }
}

TEST(Allocate, RealShape) {
    // 2, 3, 4, 5 bits of 128 values and a scale; every slot five times as sensitive as the one before; cost falls by 4 a bit.
    Slots slots(5);
    for (std::size_t s = 0; s < slots.size(); s++)
        for (int bits = 2; bits <= 5; bits++) slots[s].push_back({1024 * bits + 128, std::pow(5.0, s) * std::pow(4.0, -bits)});
    const Allocation a = allocate(slots, 5 * (1024 * 3 + 128));
    EXPECT_NEAR(a.cost, brute_force(slots, 5 * (1024 * 3 + 128)), 1e-12);
    EXPECT_EQ(a.choice, (std::vector<std::size_t>{0, 0, 0, 2, 3}));
}

TEST(Allocate, ZeroSlackTakesTheSmallestAndAmpleBudgetTheCheapest) {
    const Slots slots{{{10, 5.0}, {20, 1.0}, {30, 1.0}}, {{7, 2.0}, {9, 3.0}}};
    EXPECT_EQ(allocate(slots, 17).choice, (std::vector<std::size_t>{0, 0}));
    EXPECT_EQ(allocate(slots, 1'000'000'000'000).choice, (std::vector<std::size_t>{1, 0})) << "of equal costs the smaller size";
    EXPECT_EQ(allocate({}, 5).size, 0);
}

TEST(Allocate, OddSizesAreNearExactAndNeverOverBudget) {
    SplitMix64 random(3);
    Slots slots(40);
    for (auto& options : slots)
        for (int o = 0; o < 6; o++) {
            const double bits = 1 + random.uniform() * 7;
            options.push_back({static_cast<std::int64_t>(bits * 1e9), std::pow(4.0, -bits) * (1 + random.uniform())});
        }
    const std::int64_t budget = (total(slots, false) + total(slots, true)) / 2;
    const Allocation a = allocate(slots, budget);
    expect_consistent(slots, budget, a);
    // A lower bound: the relaxed problem at the best multiplier (Everett 1963).
    double bound = 0;
    for (double lambda = 1e-14; lambda < 1e-8; lambda *= 1.01) {
        double value = -lambda * static_cast<double>(budget);
        for (const auto& options : slots) {
            double least = HUGE_VAL;
            for (const SlotOption& o : options) least = std::min(least, o.cost + lambda * static_cast<double>(o.size));
            value += least;
        }
        bound = std::max(bound, value);
    }
    EXPECT_GT(bound, 0);
    EXPECT_GE(a.cost, bound * (1 - 1e-9));
    EXPECT_LE(a.cost, bound * 1.02);
}

TEST(Allocate, RefusesWhatCannotBe) {
    EXPECT_THROW(allocate(Slots{{{10, 1.0}}, {{5, 1.0}}}, 14), std::invalid_argument);
    EXPECT_THROW(allocate(Slots{{}}, 14), std::invalid_argument);
    EXPECT_THROW(allocate(Slots{{{10, std::numeric_limits<double>::quiet_NaN()}}}, 14), std::invalid_argument);
    EXPECT_THROW(allocate(Slots{{{-1, 1.0}}}, 14), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
