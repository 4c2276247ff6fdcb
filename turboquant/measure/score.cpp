#include "turboquant/measure/score.h"

#include <algorithm>
#include <cmath>

namespace turboquant::measure {

TokenScore score_token(std::span<const float> ref, std::span<const float> logits, int target) {
    const auto top_ref = std::ranges::max_element(ref), top = std::ranges::max_element(logits);
    const double max_ref = *top_ref, max = *top;
    // With r and l the logits, Z their partition sums: KL = sum_i p_i (r_i - l_i) - (ln Z_r - ln Z_l).
    double z_ref = 0, z = 0, weighted = 0;
    thread_local std::vector<double> weights_ref, weights;
    weights_ref.resize(ref.size()), weights.resize(ref.size());
    for (std::size_t i = 0; i < ref.size(); i++) {
        const double r = ref[i], l = logits[i], e = weights_ref[i] = std::exp(r - max_ref);
        z_ref += e;
        z += weights[i] = std::exp(l - max);
        if (e > 0) weighted += e * (r - l);
    }
    double apart = 0;
    for (std::size_t i = 0; i < ref.size(); i++) apart += std::abs(weights_ref[i] / z_ref - weights[i] / z);
    const double log_z_ref = max_ref + std::log(z_ref), log_z = max + std::log(z);
    TokenScore s;
    s.kld = weighted / z_ref - (log_z_ref - log_z);
    if (s.kld < 0) s.kld = 0;  // rounding; KL is never negative (and a NaN stays one)
    s.tv = apart / 2;
    s.nll = log_z - logits[static_cast<std::size_t>(target)];
    s.nll_ref = log_z_ref - ref[static_cast<std::size_t>(target)];
    s.same_top = top_ref - ref.begin() == top - logits.begin();
    return s;
}

double quantile(std::span<const double> ascending, double fraction) {
    const double at = std::clamp(fraction, 0.0, 1.0) * static_cast<double>(ascending.size() - 1);
    const auto below = static_cast<std::size_t>(at);
    const double part = at - static_cast<double>(below);
    return (1 - part) * ascending[below] + part * ascending[std::min(below + 1, ascending.size() - 1)];
}

ScoreSummary summarize(std::span<const TokenScore> scores) {
    ScoreSummary s;
    if (scores.empty()) return s;
    std::vector<double> kld;
    double nll = 0, nll_ref = 0;
    std::size_t same = 0;
    for (const TokenScore& t : scores) {
        nll += t.nll, nll_ref += t.nll_ref, same += t.same_top, s.overlap += 1 - t.tv;
        kld.push_back(t.kld);
    }
    const auto n = static_cast<double>(scores.size());
    const auto [mean, error] = mean_error(kld);
    s.mean_kld = mean, s.mean_kld_error = error;
    s.overlap /= n;
    std::ranges::sort(kld);
    s.ppl = std::exp(nll / n), s.ppl_ref = std::exp(nll_ref / n);
    s.median_kld = quantile(kld, 0.5), s.kld_99 = quantile(kld, 0.99), s.kld_999 = quantile(kld, 0.999);
    s.same_top = static_cast<double>(same) / n;
    s.tokens = scores.size();
    return s;
}

MeanError mean_error(std::span<const double> values) {
    if (values.empty()) return {};
    const std::size_t n = values.size(), block = std::clamp<std::size_t>(n / 8, 1, kErrorBlock);
    double sum = 0, squares = 0;
    for (const double x : values) sum += x;
    const double mean = sum / static_cast<double>(n);
    std::size_t n_blocks = 0;
    for (std::size_t at = 0; at < n; at += block, n_blocks++) {
        double off = 0;
        for (const double x : values.subspan(at, std::min(block, n - at))) off += x - mean;
        squares += off * off;
    }
    const auto b = static_cast<double>(n_blocks);
    return {mean, b > 1 ? std::sqrt(squares * b / (b - 1)) / static_cast<double>(n) : 0};
}

MeanError paired_difference(std::span<const TokenScore> a, std::span<const TokenScore> b) {
    std::vector<double> differences;
    for (std::size_t i = 0; i < std::min(a.size(), b.size()); i++) differences.push_back(a[i].kld - b[i].kld);
    return mean_error(differences);
}

}  // namespace turboquant::measure
