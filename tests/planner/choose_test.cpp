// Formats for a budget from hand-made measurements: what is chosen, what a choice is predicted to cost, and other budgets from a plan's file.
#include "turboquant/planner/choose.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace turboquant {
namespace {

/// A model of `n_layers` with a KV head of 64; keys and values of layer i cost `k[i]` and `v[i]` in tcq3 and tcq2; divergence proportional to the
/// squared error.
Measurements measurements(const std::vector<double>& k, const std::vector<double>& v) {
    Measurements m;
    m.n_layers = static_cast<int>(k.size()), m.n_ctx_train = 4096;
    m.k_format = CodecId::tcq3, m.v_format = CodecId::tcq2;
    m.tokens = 4096, m.cell_bits = 32, m.text = "by hand";
    double k_sum = 0, v_sum = 0;
    for (std::size_t i = 0; i < k.size(); i++) {
        m.slots.push_back({static_cast<int>(i), Side::key, 64, 1, -1, 0, k[i], k[i] / 10});
        m.slots.push_back({static_cast<int>(i), Side::value, 64, 1, -1, 0, v[i], v[i] / 10});
        k_sum += k[i], v_sum += v[i];
    }
    for (const CodecId c : {CodecId::tcq1, CodecId::tcq2, CodecId::tcq3, CodecId::tcq4}) {
        m.k_responses.push_back({c, k_sum * relative_mse(c, Side::key, 64) / relative_mse(CodecId::tcq3, Side::key, 64)});
        m.v_responses.push_back({c, v_sum * relative_mse(c, Side::value, 64) / relative_mse(CodecId::tcq2, Side::value, 64)});
    }
    return m;
}

const std::vector<double> kKeys{4e-4, 3e-5, 2e-3, 1e-4, 6e-4, 2e-5}, kValues{2e-4, 4e-4, 1e-3, 3e-5, 3e-4, 6e-5};

double total(const Plan& p) { return *p.predicted_kld; }

TEST(Choose, NoUniformPairOfNoMoreBitsIsPredictedToBeBetter) {
    const Measurements m = measurements(kKeys, kValues);
    for (const double bits : {2.25, 2.8, 3.25, 3.7, 4.25}) {
        const double whole = bits * m.values(2048);
        const Plan plan = allocate_formats(m, whole, 2048);
        EXPECT_LE(plan.bits_per_value, bits);
        EXPECT_GT(plan.bits_per_value, bits - 1.0 / 12);
        const std::vector<UniformPair> pairs = uniform_pairs(m, whole, 2048);
        ASSERT_FALSE(pairs.empty());
        EXPECT_TRUE(std::ranges::is_sorted(pairs, {}, &UniformPair::predicted_kld));
        for (const UniformPair& p : pairs) {
            EXPECT_LE(p.bits_per_value, bits + 1e-9);
            EXPECT_LT(total(plan), p.predicted_kld) << bits;
            EXPECT_NEAR(*uniform_plan(m, p).predicted_kld, p.predicted_kld, 1e-12);
        }
        // The best pair is not far off either, or something else than the measurements spoke.
        EXPECT_LT(pairs.front().predicted_kld, 5 * total(plan));
    }
}

TEST(Choose, RulesKeepWithinTheBudgetToo) {
    const Measurements m = measurements(kKeys, kValues);
    for (const double bits : {2.25, 3.25, 4.25}) {
        const std::optional<Plan> plan = rule_plan(m, bits * m.values(2048), 2048);
        ASSERT_TRUE(plan);
        EXPECT_LE(plan->bits_per_value, bits);
        EXPECT_GT(plan->bits_per_value, bits - 1.0 / 12 - 0.01);
        EXPECT_GE(*plan->predicted_kld, *allocate_formats(m, bits * m.values(2048), 2048).predicted_kld);
        double sum = 0;
        for (const PlannedLayer& l : plan->layers) sum += l.k_kld + l.v_kld;
        EXPECT_NEAR(sum, *plan->predicted_kld, 1e-12);
    }
    EXPECT_FALSE(rule_plan(m, 1.2 * m.values(2048), 2048));
}

TEST(Choose, CostlySlotsGetTheBits) {
    const Measurements m = measurements(kKeys, kValues);
    const Plan plan = allocate_formats(m, 3.25 * m.values(2048), 2048);
    const auto bits = [&](int layer) { return codec_info(plan.layers[static_cast<std::size_t>(layer)].k.of(0)).bits; };
    EXPECT_GT(bits(2), bits(1));
    EXPECT_GT(bits(2), bits(5));
    // Drawn wholly to the mean of their side, all layers are alike but for what does not divide evenly.
    const Plan even = allocate_formats(m, 3.25 * m.values(2048), 2048, 1);
    double least = 99, most = 0;
    for (const PlannedLayer& l : even.layers)
        least = std::min<double>(least, codec_info(l.k.of(0)).bits), most = std::max<double>(most, codec_info(l.k.of(0)).bits);
    EXPECT_LE(most - least, 1);
}

TEST(Choose, ExpectedErrorsTellHeadsApartThatWereMeasuredTogether) {
    // Two layers of four heads, each layer measured as one group: what heads share is as their errors are expected to be.
    Measurements m = measurements({1e-3, 1e-3, 1e-3, 1e-3}, {1e-3, 1e-3, 1e-3, 1e-3});
    const double factors[] = {0.1, 0.4, 1.5, 2.0};
    for (MeasuredSlot& s : m.slots) {
        const double own = factors[s.layer];
        if (s.side == Side::value)
            s.expected = {own};
        else
            for (const double e : kKeyErrors) s.expected.push_back(own * e);
        s.kld = 1e-3 * own, s.error = 1e-4 * own;
    }
    const CostModel model(m);
    for (std::size_t i = 0; i < m.slots.size(); i++)
        for (const CodecId c : {CodecId::tcq2, CodecId::tcq4}) {
            const std::size_t other = i < 2 ? i + 2 : i - 2;
            EXPECT_NEAR(model.cost(i, c) / model.cost(other, c), factors[m.slots[i].layer] / factors[m.slots[other].layer], 1e-6);
        }
    const Plan plan = allocate_formats(m, 3.25 * m.values(2048), 2048);
    EXPECT_GT(codec_info(plan.layers[3].k.of(0)).bits, codec_info(plan.layers[0].k.of(0)).bits);
    EXPECT_EQ(parse_plan(to_json([&] {
                  Plan kept = plan;
                  kept.model_hash = "x", kept.model_name = "by hand", kept.measurements = m;
                  return kept;
              }()))
                  .measurements,
              m);
}

TEST(Choose, NegativeMeasurementsAreNotFree) {
    // As where a floor was too high: such a slot still costs something, and does not fall to the smallest format.
    std::vector<double> keys = kKeys;
    keys[5] = -8e-4;
    const Measurements m = measurements(keys, kValues);
    const CostModel model(m);
    EXPECT_GT(model.cost(10, CodecId::tcq1), 0);
    EXPECT_GT(model.cost(10, CodecId::tcq1), model.cost(10, CodecId::tcq2));
}

TEST(Choose, BudgetBelowTheLeastIsRefusedWithTheLeast) {
    const Measurements m = measurements(kKeys, kValues);
    try {
        allocate_formats(m, 1.2 * m.values(2048), 2048);
        FAIL();
    } catch (const std::invalid_argument& e) {
        EXPECT_NE(std::string(e.what()).find("1.3"), std::string::npos) << e.what();
    }
}

TEST(Choose, PlanFileServesOtherBudgets) {
    Measurements m = measurements(kKeys, kValues);
    m.key_scales[2] = std::string(64, 'a');
    Plan plan = allocate_formats(m, 4.25 * m.values(2048), 2048);
    plan.model_hash = "x", plan.model_name = "by hand", plan.measurements = m;
    plan.race = {{"k=tcq4,v=tcq4", 0.001, 0, 0}, {"k=tcq5,v=tcq3", 0.002, 0.001, 0.0002}};
    const Plan read = parse_plan(to_json(plan));
    EXPECT_EQ(read, plan);
    const Plan other = replan(read, {3.25, 0}, 2048);
    EXPECT_EQ(other.layers, allocate_formats(m, 3.25 * m.values(2048), 2048).layers);
    EXPECT_EQ(other.model_hash, "x");
    EXPECT_TRUE(other.race.empty()) << "nothing was run";
    EXPECT_LE(replan(read, {0, 4.25 * m.values(2048) / 8}, 2048).bits_per_value, 4.25);
    Plan bare = read;
    bare.measurements.reset();
    EXPECT_THROW(replan(bare, {3.25, 0}, 2048), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
