#include "turboquant/planner/measurements.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <span>
#include <stdexcept>
#include <utility>

#include "turboquant/codec/tile.h"

namespace turboquant {
namespace {

constexpr double kFarBelow = 3;      // a factor is at least the median's e^-3: no slot is free, whatever was measured
constexpr double kTextError = 0.15;  // relative: what another text would change, beside the standard error on one
constexpr double kStray = 0.4;       // of factors from the parabola, in ln, before it is known
constexpr int kLayersForParabola = 6;
constexpr double kLeastExpected = 1e-300;

/// Weighted least squares of y over 1, x, x^2, or over 1 alone.
std::vector<double> fitted(std::span<const double> x, std::span<const double> y, std::span<const double> weight, int terms) {
    double a[3][4] = {};
    for (std::size_t i = 0; i < x.size(); i++) {
        const double basis[3] = {1, x[i], x[i] * x[i]};
        for (int r = 0; r < terms; r++) {
            for (int c = 0; c < terms; c++) a[r][c] += weight[i] * basis[r] * basis[c];
            a[r][3] += weight[i] * basis[r] * y[i];
        }
    }
    for (int r = 0; r < terms; r++)  // Gauss and Jordan: the matrix is symmetric and positive
        for (int other = 0; other < terms; other++) {
            if (other == r) continue;
            const double by = a[other][r] / a[r][r];
            for (int c = 0; c < 4; c++) a[other][c] -= by * a[r][c];
        }
    std::vector<double> out;
    for (const double at : x) {
        double sum = 0, power = 1;
        for (int r = 0; r < terms; r++, power *= at) sum += a[r][3] / a[r][r] * power;
        out.push_back(sum);
    }
    return out;
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

double MeasuredSlot::expected_at(double mse) const {
    if (expected.empty()) return mse * n_heads();
    if (side == Side::value) return mse * expected.front();
    if (expected.size() != std::size(kKeyErrors)) throw std::invalid_argument("a slot's expected errors are not those of keys");
    std::vector<CostPoint> points;
    for (std::size_t i = 0; i < expected.size(); i++) points.push_back({kKeyErrors[i], expected[i]});
    return CostCurve(std::move(points), kLeastExpected).at(mse);
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
        bits += options.windows.resolve(n).bits(n, static_cast<std::int64_t>(s.head_dim) * s.n_heads(), s.head_dim);
        if (s.side == Side::key && options.offset) bits += (16 + 8.0 * key_scales.contains(s.layer)) * s.head_dim * s.n_heads();
    }
    return bits;
}

CostModel::CostModel(const Measurements& m, double evenness) : head_dim_(head_dim_of(m)), slots_(m.slots), factors_(m.slots.size(), 1) {
    for (const Side side : {Side::key, Side::value}) fit_factors(m, side, evenness), fit_corrections(m, side);
}

void CostModel::fit_factors(const Measurements& m, Side side, double evenness) {
    SideModel& model = side == Side::key ? keys_ : values_;
    std::vector<double> seen, depth, variance, weight;
    std::set<int> layers;
    bool known = true;
    for (std::size_t i = 0; i < slots_.size(); i++) {
        const MeasuredSlot& s = slots_[i];
        if (s.side != side) continue;
        model.slots.push_back(i);
        layers.insert(s.layer);
        known = known && !s.expected.empty();
        seen.push_back(std::log(std::max(s.kld, kLeastExpected) / std::max(s.expected_at(mse(side, m.slot_format(side))), kLeastExpected)));
        depth.push_back(static_cast<double>(s.layer) / std::max(1, m.n_layers - 1));
        variance.push_back(std::pow(std::clamp(s.error / std::max(s.kld, kLeastExpected), 0.02, 1.0), 2) + kTextError * kTextError);
        weight.push_back(1 / (kStray * kStray + variance.back()));
    }
    if (seen.empty()) return;
    std::vector<double> ascending = seen;
    std::ranges::sort(ascending);
    for (double& x : seen) x = std::max(x, ascending[ascending.size() / 2] - kFarBelow);
    const std::vector<double> curve = fitted(depth, seen, weight, known && static_cast<int>(layers.size()) >= kLayersForParabola ? 3 : 1);
    double strays = 0, explained = 0;
    for (std::size_t i = 0; i < seen.size(); i++) strays += std::pow(seen[i] - curve[i], 2), explained += variance[i];
    const double own = std::max(0.0, (strays - explained) / static_cast<double>(seen.size()));
    for (std::size_t i = 0; i < seen.size(); i++) {
        const double believed = (1 - evenness) * own / (own + variance[i]);
        factors_[model.slots[i]] = std::exp(believed * seen[i] + (1 - believed) * curve[i]);
    }
}

void CostModel::fit_corrections(const Measurements& m, Side side) {
    SideModel& model = side == Side::key ? keys_ : values_;
    for (const Response& r : side == Side::key ? m.k_responses : m.v_responses) {
        const double error = mse(side, r.codec);
        double expected = 0;
        for (const std::size_t i : model.slots) expected += factors_[i] * slots_[i].expected_at(error);
        if (expected > 0) model.corrections.push_back({error, std::max(r.kld, 1e-12) / expected});
    }
    std::ranges::sort(model.corrections, {}, &CostPoint::mse);
}

double CostModel::SideModel::correction(double mse) const { return corrections.empty() ? 1 : power_law(corrections, mse); }

double CostModel::mse(Side side, CodecId codec) const { return relative_mse(codec, side, head_dim_); }

double CostModel::cost(std::size_t slot, CodecId codec) const {
    const MeasuredSlot& s = slots_[slot];
    const double error = mse(s.side, codec);
    return factors_[slot] * s.expected_at(error) * side_model(s.side).correction(error);
}

double CostModel::uniform(CodecId k, CodecId v) const {
    double sum = 0;
    for (std::size_t i = 0; i < slots_.size(); i++) sum += cost(i, slots_[i].side == Side::key ? k : v);
    return sum;
}

}  // namespace turboquant
