// Formats for a budget, from measurements: by allocation over the slots, and the uniform pairs that they are held against.
#pragma once

#include <optional>
#include <vector>

#include "turboquant/planner/measurements.h"
#include "turboquant/planner/plan.h"
#include "turboquant/spec/words.h"

namespace turboquant {

/// Bits of the whole cache that a budget means in a context of n_ctx.
double budget_bits(const Measurements& m, const Budget& budget, std::int64_t n_ctx);

/// The layers' formats of least predicted divergence within `bits` of the whole cache, everything that is stored counted. `evenness` as in
/// CostModel. Only layers, budget-independent figures and predictions of the plan are filled in. Throws std::invalid_argument, naming the least
/// that the cache takes, if that is above the budget.
Plan allocate_formats(const Measurements& m, double bits, std::int64_t n_ctx, double evenness = 0);

/// Keys of all layers in one format, values in another.
struct UniformPair {
    CodecId k = CodecId::raw, v = CodecId::raw;
    double bits_per_value = 0;
    double predicted_kld = 0;
};

/// Those within `bits` of the whole cache, the best prediction first.
std::vector<UniformPair> uniform_pairs(const Measurements& m, double bits, std::int64_t n_ctx);

/// A pair as a plan.
Plan uniform_plan(const Measurements& m, const UniformPair& pair);

/// What would be chosen without measurements (prior.h), with its prediction; none if its formats take more than `bits`, as where layers differ in
/// cells.
std::optional<Plan> rule_plan(const Measurements& m, double bits, std::int64_t n_ctx);

/// A plan for another budget from the measurements that a plan keeps: nothing is run, so nothing is raced. n_ctx 0: the context the model was
/// trained on. Throws std::invalid_argument, also if the plan keeps none.
Plan replan(const Plan& measured, const Budget& budget, int n_ctx);

}  // namespace turboquant
