#include "turboquant/planner/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "turboquant/codec/random.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/tile.h"

namespace turboquant {

namespace {

double measure_mse(CodecId codec, Side side, int head_dim) {
    if (is_composite(codec)) throw std::invalid_argument("relative_mse: the error of a composite format depends on the data");
    const Rotation& rotation = rotation_for(head_dim);
    const TileShape shape{codec, side, head_dim};
    std::vector<std::uint8_t> tile(tile_bytes(shape));
    std::vector<float> x(static_cast<std::size_t>(head_dim)), y(x.size()), decoded(x.size());
    SplitMix64 random(1);
    double error = 0, energy = 0;
    for (int i = 0; i < 4 * kTileKeys; i++) {
        for (float& v : x) v = static_cast<float>(random.normal());
        tile_encode(shape, tile.data(), i % kTileKeys, x, default_norm_mode(side));
        tile_decode_rotated(shape, tile.data(), i % kTileKeys, decoded);
        y = x;
        if (codec_info(codec).rotated) rotation.forward(y);
        for (std::size_t j = 0; j < x.size(); j++)
            error += std::pow(static_cast<double>(y[j]) - decoded[j], 2), energy += std::pow(static_cast<double>(y[j]), 2);
    }
    return error / energy;
}

}  // namespace

double relative_mse(CodecId codec, Side side, int head_dim) {
    static std::mutex mutex;
    static std::map<std::tuple<CodecId, Side, int>, double> known;
    const std::lock_guard lock(mutex);
    const auto found = known.find({codec, side, head_dim});
    return found != known.end() ? found->second : known[{codec, side, head_dim}] = measure_mse(codec, side, head_dim);
}

double power_law(std::span<const CostPoint> points, double mse) {
    const CostPoint &first = points.front(), &last = points.back();
    if (mse <= first.mse) return first.kld;
    if (mse >= last.mse) return last.kld;
    const auto high = std::ranges::upper_bound(points, mse, {}, &CostPoint::mse), low = high - 1;
    const double slope = std::log(high->kld / low->kld) / std::log(high->mse / low->mse);
    return low->kld * std::pow(mse / low->mse, slope);
}

CostCurve::CostCurve(std::vector<CostPoint> points, double floor) : points_(std::move(points)) {
    if (points_.empty()) throw std::invalid_argument("CostCurve: no measurement");
    std::ranges::sort(points_, {}, &CostPoint::mse);
    for (std::size_t i = 0; i < points_.size(); i++) {
        CostPoint& p = points_[i];
        if (!(p.mse > 0) || !std::isfinite(p.mse) || !std::isfinite(p.kld) || (i && points_[i - 1].mse == p.mse))
            throw std::invalid_argument("CostCurve: errors of measured points must be positive, finite and different");
        p.kld = std::max({p.kld, floor, i ? points_[i - 1].kld : 0});
    }
}

double CostCurve::at(double mse) const {
    const CostPoint &first = points_.front(), &last = points_.back();
    if (mse <= first.mse) return first.kld * mse / first.mse;
    if (mse >= last.mse) return last.kld * mse / last.mse;
    return power_law(points_, mse);
}

}  // namespace turboquant
