// Scales for key channels from what keys and queries of a head look like.
//
// A rotated codec puts the same error, mse * |k|^2 / d, on every channel of a key. The error of a score is then
//   mse / d * (sum_i s_i^2 Var k_i) * (sum_i E[q_i^2] / s_i^2)
// for keys scaled by s_i and queries by 1/s_i, which is least (Cauchy-Schwarz) for s_i^4 = E[q_i^2] / Var k_i.
#pragma once

#include <span>
#include <utility>
#include <vector>

namespace turboquant {

/// Scales of one head, geometric mean 1. `variance` of the keys as they are encoded (without their offset), `energy` the mean square of the
/// queries, both [head_dim]. `ties`: channels that must share a scale, because RoPE mixes them; at most one tie a channel. Channels whose
/// variance or energy is below 1e-6 of the head's mean count as that much. All 1 if the keys or the queries are nothing, or not finite.
std::vector<float> balance_keys(std::span<const double> variance, std::span<const double> energy,
                                std::span<const std::pair<int, int>> ties);

}  // namespace turboquant
