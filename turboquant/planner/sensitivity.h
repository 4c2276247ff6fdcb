// What a format is predicted to cost in one part of the cache, from a few measurements of that part.
#pragma once

#include <span>
#include <vector>

#include "turboquant/codec/codec.h"

namespace turboquant {

/// Mean squared error of a codec relative to |x|^2, on Gaussian vectors (fixed seed, so the same everywhere), with the side's default norm
/// mode. What a rotated codec does to any vector. Measured once (a trellis takes some 50 ms), thread-safe. Throws std::invalid_argument for
/// composite codecs and unsupported head sizes.
double relative_mse(CodecId codec, Side side, int head_dim);

/// One measurement of a slot: all of the cache exact, but this slot in a format of this error.
struct CostPoint {
    double mse = 0;  ///< relative_mse of the format
    double kld = 0;  ///< mean KL divergence against the exact cache, nats
};

/// Between points, which ascend in mse: the power law through both neighbours. Outside: the value of the nearest.
double power_law(std::span<const CostPoint> points, double mse);

/// KL divergence of a slot as a function of the error put into it. To first order the divergence is quadratic in the error vector, so
/// proportional to the MSE; at large errors it grows faster. Between two measured points: the power law through both. Outside: proportional
/// to the MSE, which is the limit for small errors (and at large ones keeps noise in the slope from being extrapolated).
class CostCurve {
  public:
    /// At least one point, mse > 0 and all different; kld below `floor` (what measurement cannot tell from nothing) counts as `floor`, and
    /// the curve never falls with the MSE. Throws std::invalid_argument otherwise.
    explicit CostCurve(std::vector<CostPoint> points, double floor = 1e-9);

    /// Predicted mean KL divergence at a relative MSE >= 0.
    double at(double mse) const;
    std::span<const CostPoint> points() const { return points_; }

  private:
    std::vector<CostPoint> points_;  ///< ascending in mse and kld
};

}  // namespace turboquant
