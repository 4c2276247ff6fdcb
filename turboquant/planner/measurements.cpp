#include "turboquant/planner/measurements.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "turboquant/codec/tile.h"

namespace turboquant {
namespace {

constexpr double kPriorTokens = 512;  // heads of a layer
constexpr double kAlikeTokens = 768;  // slots of a side
constexpr double kLeastShare = 0.02;  // of the mean slot: no slot is free, whatever was measured

CostCurve curve_of(const Measurements& m, Side side, int head_dim) {
    std::vector<CostPoint> points;
    for (const Response& r : side == Side::key ? m.k_responses : m.v_responses)
        points.push_back({relative_mse(r.codec, side, head_dim), r.kld});
    // A model without values has no responses of them.
    if (points.empty()) points.push_back({1, 1});
    return CostCurve(std::move(points));
}

int head_dim_of(const Measurements& m) {
    if (m.slots.empty()) throw std::invalid_argument("no slots were measured");
    if (m.k_responses.empty()) throw std::invalid_argument("no responses were measured");
    return m.slots.front().head_dim;
}

}  // namespace

std::vector<CodecId> planned_codecs() {
    std::vector<CodecId> out;
    for (const CodecInfo& c : kCodecs)
        if (!is_composite(c.id)) out.push_back(c.id);
    return out;
}

double tile_bytes_of(const MeasuredSlot& s, CodecId codec) {
    return static_cast<double>(tile_bytes({codec, s.side, s.head_dim})) * s.n_heads();
}

double Measurements::values(std::int64_t n_ctx) const {
    double n = 0;
    for (const MeasuredSlot& s : slots) n += s.values(n_ctx);
    return n;
}

double Measurements::fixed_bits(std::int64_t n_ctx) const {
    double bits = cell_bits * static_cast<double>(n_ctx);
    for (const MeasuredSlot& s : slots) {
        const std::int64_t n = s.cells(n_ctx);
        bits += options.windows.resolve(n).bits(n, static_cast<std::int64_t>(s.head_dim) * s.n_heads());
        if (s.side == Side::key && options.offset) bits += (16 + 8.0 * key_scales.contains(s.layer)) * s.head_dim * s.n_heads();
    }
    return bits;
}

double default_evenness(const Measurements& m) { return kAlikeTokens / (kAlikeTokens + std::max(0, m.tokens)); }

CostModel::CostModel(const Measurements& m, double evenness)
    : head_dim_(head_dim_of(m)),
      k_curve_(curve_of(m, Side::key, head_dim_)),
      v_curve_(curve_of(m, Side::value, head_dim_)),
      k_measured_(k_curve_.at(mse(Side::key, m.k_format))),
      v_measured_(v_curve_.at(mse(Side::value, m.v_format))) {
    const double prior = std::min(1.0, kPriorTokens / std::max(1.0, static_cast<double>(m.tokens)));
    for (const Side side : {Side::key, Side::value}) {
        // Per value, so that slots of different sizes can be drawn towards each other.
        double sum = 0, n = 0;
        for (const MeasuredSlot& s : m.slots)
            if (s.side == side) sum += std::max(0.0, s.kld), n += s.n_heads();
        const double least = kLeastShare * std::max(sum, 1e-12) / std::max(n, 1.0);
        double log_sum = 0, n_slots = 0;
        for (const MeasuredSlot& s : m.slots)
            if (s.side == side) log_sum += std::log(std::max(s.kld / s.n_heads(), least)), n_slots++;
        const double log_mean = n_slots > 0 ? log_sum / n_slots : 0;
        for (std::size_t i = 0; i < m.slots.size(); i++) {
            const MeasuredSlot& s = m.slots[i];
            if (s.side != side) continue;
            sensitivity_.resize(m.slots.size()), sides_.resize(m.slots.size());
            sides_[i] = side;
            double own = std::max(s.kld / s.n_heads(), least);
            if (s.head >= 0) {
                double all = 0;
                for (const MeasuredSlot& o : m.slots)
                    if (o.layer == s.layer && o.side == side) all += std::max(o.kld, least);
                own = (1 - prior) * own + prior * all / s.of_heads;
            }
            sensitivity_[i] = std::exp((1 - evenness) * std::log(own) + evenness * log_mean) * s.n_heads();
        }
    }
}

double CostModel::mse(Side side, CodecId codec) const { return relative_mse(codec, side, head_dim_); }

double CostModel::cost(std::size_t slot, CodecId codec) const {
    const bool key = sides_[slot] == Side::key;
    const CostCurve& curve = key ? k_curve_ : v_curve_;
    return sensitivity_[slot] * curve.at(mse(sides_[slot], codec)) / (key ? k_measured_ : v_measured_);
}

}  // namespace turboquant
