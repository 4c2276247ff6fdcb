#include "turboquant/planner/choose.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>

#include "turboquant/codec/tile.h"
#include "turboquant/planner/allocate.h"
#include "turboquant/planner/prior.h"

namespace turboquant {
namespace {

std::string digits(double x, int n) {
    std::string text = std::to_string(x);
    return text.substr(0, text.find('.') + 1 + static_cast<std::size_t>(n));
}

/// Bits of the codes of a slot.
double code_bits(const MeasuredSlot& s, CodecId codec, std::int64_t n_ctx) {
    return 8 * tile_bytes_of(s, codec) * static_cast<double>(s.cells(n_ctx)) / kTileKeys;
}

double least_bits(const Measurements& m, std::int64_t n_ctx) {
    double bits = m.fixed_bits(n_ctx);
    for (const MeasuredSlot& s : m.slots) {
        double least = HUGE_VAL;
        for (const CodecId c : planned_codecs()) least = std::min(least, code_bits(s, c, n_ctx));
        bits += least;
    }
    return bits;
}

/// Slots that get one format together: each by itself, or all heads of a side of a layer.
std::vector<std::vector<std::size_t>> groups(const Measurements& m, bool per_head) {
    std::vector<std::vector<std::size_t>> out;
    for (std::size_t s = 0; s < m.slots.size(); s++) {
        if (per_head || m.slots[s].head <= 0) out.emplace_back();
        out.back().push_back(s);
    }
    return out;
}

Plan plan_of(const Measurements& m) {
    Plan plan;
    plan.n_layers = m.n_layers;
    plan.calibration = m.text, plan.calibration_tokens = m.tokens;
    plan.options = m.options;
    return plan;
}

}  // namespace

double budget_bits(const Measurements& m, const Budget& budget, std::int64_t n_ctx) {
    return budget.bits > 0 ? budget.bits * m.values(n_ctx) : 8 * budget.bytes;
}

Plan allocate_formats(const Measurements& m, double bits, std::int64_t n_ctx, double evenness) {
    const double values = m.values(n_ctx), fixed = m.fixed_bits(n_ctx);
    if (const double least = least_bits(m, n_ctx); bits < least)
        throw std::invalid_argument(
            "the budget is below the least that this model's cache takes: " + digits(std::ceil(1000 * least / values) / 1000, 3) +
            " bits per value, " + digits(std::ceil(100 * least / 8 / (1 << 20)) / 100, 2) + " MiB at " + std::to_string(n_ctx) + " tokens");
    // Sizes in bytes of 64 cells; layers with fewer cells than others weigh less, in 64ths.
    const auto weight = [&](const MeasuredSlot& s) {
        return std::max(1.0, std::round(64 * static_cast<double>(s.cells(n_ctx)) / static_cast<double>(n_ctx)));
    };
    const double unit_bits = 8.0 * static_cast<double>(n_ctx) / (64.0 * kTileKeys);
    const auto room = static_cast<std::int64_t>((bits - fixed) / unit_bits + 1e-6);
    // With room for the widest format that mixes in every head, what is left to choose is `raw`, for all heads of a layer or none.
    double all_mixed = 0;
    for (const MeasuredSlot& s : m.slots) all_mixed += tile_bytes_of(s, CodecId::turbo8) * weight(s);
    const std::vector<std::vector<std::size_t>> together = groups(m, static_cast<double>(room) < all_mixed);
    const CostModel model(m, evenness);
    std::vector<std::vector<SlotOption>> options;
    std::vector<std::vector<CodecId>> codecs;
    for (const std::vector<std::size_t>& group : together) {
        options.emplace_back(), codecs.emplace_back();
        for (const CodecId c : planned_codecs()) {
            if (m.slots[group.front()].head >= 0 && group.size() == 1 && !mixes(c)) continue;
            SlotOption o;
            for (const std::size_t i : group) {
                o.size += static_cast<std::int64_t>(tile_bytes_of(m.slots[i], c) * weight(m.slots[i]));
                o.cost += model.cost(i, c);
            }
            options.back().push_back(o), codecs.back().push_back(c);
        }
    }
    const Allocation best = allocate(options, room);
    Plan plan = plan_of(m);
    plan.bits_per_value = (unit_bits * static_cast<double>(best.size) + fixed) / values;
    plan.predicted_kld = best.cost + m.floor;
    std::map<int, std::array<std::vector<CodecId>, 2>> chosen;
    std::map<int, PlannedLayer> layers;
    for (std::size_t g = 0; g < together.size(); g++) {
        const MeasuredSlot& s = m.slots[together[g].front()];
        const bool key = s.side == Side::key;
        PlannedLayer& l = layers[s.layer];
        l.layer = s.layer;
        (key ? l.k_kld : l.v_kld) += options[g][best.choice[g]].cost;
        chosen[s.layer][key ? 0 : 1].push_back(codecs[g][best.choice[g]]);
    }
    for (auto& [layer, l] : layers) {
        l.k = HeadCodecs(chosen[layer][0]);
        if (!chosen[layer][1].empty()) l.v = HeadCodecs(chosen[layer][1]);
        if (const auto scales = m.key_scales.find(layer); scales != m.key_scales.end() && codec_info(l.k.of(0)).rotated)
            l.k_scales = scales->second;
        plan.layers.push_back(l);
    }
    return plan;
}

std::vector<UniformPair> uniform_pairs(const Measurements& m, double bits, std::int64_t n_ctx) {
    const CostModel model(m);
    const double values = m.values(n_ctx), fixed = m.fixed_bits(n_ctx);
    std::vector<UniformPair> out;
    for (const CodecId k : planned_codecs())
        for (const CodecId v : planned_codecs()) {
            double size = fixed;
            for (const MeasuredSlot& s : m.slots) size += code_bits(s, s.side == Side::key ? k : v, n_ctx);
            if (size <= bits * (1 + 1e-9)) out.push_back({k, v, size / values, model.uniform(k, v)});
        }
    std::ranges::sort(out, {}, &UniformPair::predicted_kld);
    return out;
}

Plan uniform_plan(const Measurements& m, const UniformPair& pair) {
    Plan plan = plan_of(m);
    plan.bits_per_value = pair.bits_per_value;
    plan.predicted_kld = pair.predicted_kld + m.floor;
    const CostModel model(m);
    std::map<int, PlannedLayer> layers;
    for (std::size_t i = 0; i < m.slots.size(); i++) {
        const MeasuredSlot& s = m.slots[i];
        PlannedLayer& l = layers[s.layer];
        l.layer = s.layer;
        if (s.side == Side::key)
            l.k = pair.k, l.k_kld += model.cost(i, pair.k);
        else
            l.v = pair.v, l.v_kld += model.cost(i, pair.v);
    }
    for (auto& [layer, l] : layers) {
        if (const auto scales = m.key_scales.find(layer); scales != m.key_scales.end() && codec_info(l.k.of(0)).rotated)
            l.k_scales = scales->second;
        plan.layers.push_back(l);
    }
    return plan;
}

std::optional<Plan> rule_plan(const Measurements& m, double bits, std::int64_t n_ctx) {
    std::vector<UnmeasuredSlot> slots;  // of whole layers
    std::vector<std::size_t> first;
    for (std::size_t i = 0; i < m.slots.size(); i++) {
        const MeasuredSlot& s = m.slots[i];
        if (s.head > 0) continue;
        if (s.head_dim != m.slots.front().head_dim) return std::nullopt;
        slots.push_back({s.side, s.head_dim, s.of_heads, s.cells(n_ctx)}), first.push_back(i);
    }
    const double values = m.values(n_ctx), fixed = m.fixed_bits(n_ctx);
    std::vector<CodecId> formats;
    try {
        formats = unmeasured_formats(slots, (bits - fixed) / values, m.options.offset);
    } catch (const std::invalid_argument&) {
        return std::nullopt;
    }
    std::map<std::pair<int, Side>, CodecId> chosen;
    for (std::size_t i = 0; i < slots.size(); i++) chosen[{m.slots[first[i]].layer, slots[i].side}] = formats[i];
    Plan plan = uniform_plan(m, {});
    const CostModel model(m);
    double size = fixed, kld = 0;
    for (std::size_t i = 0; i < m.slots.size(); i++) {
        const CodecId c = chosen.at({m.slots[i].layer, m.slots[i].side});
        size += code_bits(m.slots[i], c, n_ctx), kld += model.cost(i, c);
    }
    if (size > bits * (1 + 1e-9)) return std::nullopt;
    plan.bits_per_value = size / values, plan.predicted_kld = kld + m.floor;
    for (PlannedLayer& l : plan.layers) {
        l.k = chosen.at({l.layer, Side::key}), l.k_kld = l.v_kld = 0;
        if (l.v) l.v = chosen.at({l.layer, Side::value});
        if (const auto scales = m.key_scales.find(l.layer); scales != m.key_scales.end()) l.k_scales = scales->second;
        for (std::size_t i = 0; i < m.slots.size(); i++)
            if (m.slots[i].layer == l.layer)
                (m.slots[i].side == Side::key ? l.k_kld : l.v_kld) += model.cost(i, chosen.at({l.layer, m.slots[i].side}));
    }
    return plan;
}

Plan replan(const Plan& measured, const Budget& budget, int n_ctx) {
    if (!measured.measurements)
        throw std::invalid_argument("the plan keeps no measurements; make it again with `turboquant plan`, or without --from");
    const Measurements& m = *measured.measurements;
    if (n_ctx == 0) n_ctx = m.n_ctx_train;
    const double bits = budget_bits(m, budget, n_ctx);
    Plan plan = allocate_formats(m, bits, n_ctx);
    plan.model_hash = measured.model_hash, plan.model_name = measured.model_name;
    plan.budget = bits / m.values(n_ctx);
    plan.measurements = m;
    return plan;
}

}  // namespace turboquant
