#include "turboquant/planner/key_balance.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace turboquant {
namespace {

constexpr double kLeast = 1e-6;

bool all_positive_finite(std::span<const double> x, double sum) {
    return sum > 0 && std::isfinite(sum) && std::ranges::all_of(x, [](double v) { return v >= 0; });
}

}  // namespace

std::vector<float> balance_keys(std::span<const double> variance, std::span<const double> energy,
                                std::span<const std::pair<int, int>> ties) {
    const std::size_t d = variance.size();
    const double all_k = std::accumulate(variance.begin(), variance.end(), 0.0), all_q = std::accumulate(energy.begin(), energy.end(), 0.0);
    std::vector<float> scales(d, 1.0f);
    if (d == 0 || energy.size() != d || !all_positive_finite(variance, all_k) || !all_positive_finite(energy, all_q)) return scales;
    std::vector<double> k(variance.begin(), variance.end()), q(energy.begin(), energy.end());
    for (const auto& [x, y] : ties) {
        k[x] = k[y] = k[x] + k[y];
        q[x] = q[y] = q[x] + q[y];
    }
    double log_sum = 0;
    const auto n = static_cast<double>(d);
    for (std::size_t i = 0; i < d; i++) {
        const double ratio = std::max(q[i], kLeast * all_q / n) / std::max(k[i], kLeast * all_k / n);
        scales[i] = static_cast<float>(std::pow(ratio, 0.25));
        log_sum += std::log(ratio) / 4;
    }
    for (float& s : scales) s = static_cast<float>(s / std::exp(log_sum / n));
    return scales;
}

}  // namespace turboquant
