#include "turboquant/cache/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace turboquant {
namespace {

/// Pair index at which the angle makes `rotations` turns over the original context (YaRN, eq. 17).
float yarn_pair(const RopeParams& p, float rotations) {
    return static_cast<float>(p.n_dims) * std::log(static_cast<float>(p.n_ctx_orig) / (rotations * 2 * std::numbers::pi_v<float>)) /
           (2 * std::log(p.freq_base));
}

float yarn_magnitude(const RopeParams& p) { return p.ext_factor != 0 ? 1.0f + 0.1f * std::log(1.0f / p.freq_scale) : 1.0f; }

}  // namespace

RopeParams without_magnitude(RopeParams p) {
    p.attn_factor = 1 / yarn_magnitude(p);
    return p;
}

std::vector<double> rope_frequencies(const RopeParams& p) {
    std::vector<double> w(p.n_dims / 2);
    const double theta_scale = std::pow(p.freq_base, -2.0f / static_cast<float>(p.n_dims));
    const float low = p.ext_factor != 0 ? std::max(0.0f, std::floor(yarn_pair(p, p.beta_fast))) : 0;
    const float high = p.ext_factor != 0 ? std::min(static_cast<float>(p.n_dims - 1), std::ceil(yarn_pair(p, p.beta_slow))) : 0;
    double theta = 1;
    for (std::size_t i = 0; i < w.size(); i++, theta *= theta_scale) {
        const double extrapolated = theta / (p.freq_factors ? p.freq_factors[i] : 1.0f);
        w[i] = p.freq_scale * extrapolated;
        if (p.ext_factor != 0) {
            const float ramp = 1 - std::clamp((static_cast<float>(i) - low) / std::max(0.001f, high - low), 0.0f, 1.0f);
            w[i] += (extrapolated - w[i]) * ramp * p.ext_factor;
        }
    }
    return w;
}

float rope_magnitude(const RopeParams& p) { return p.attn_factor * yarn_magnitude(p); }

void rope_table(const RopeParams& p, float pos, std::span<float> table) {
    const std::vector<double> w = rope_frequencies(p);
    const float magnitude = rope_magnitude(p);
    for (std::size_t i = 0; i < w.size(); i++) {
        table[2 * i] = static_cast<float>(std::cos(pos * w[i])) * magnitude;
        table[2 * i + 1] = static_cast<float>(std::sin(pos * w[i])) * magnitude;
    }
}

void rope_apply(const RopeParams& p, std::span<const float> table, std::span<float> x) {
    for (int i = 0; i < p.n_dims / 2; i++) {
        const auto [ia, ib] = rope_pair(p, i);
        float &a = x[ia], &b = x[ib];
        const float c = table[2 * i], s = table[2 * i + 1], a0 = a;
        a = a0 * c - b * s;
        b = a0 * s + b * c;
    }
}

}  // namespace turboquant
