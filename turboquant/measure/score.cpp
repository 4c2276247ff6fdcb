#include "turboquant/measure/score.h"

#include <algorithm>
#include <cmath>

namespace turboquant::measure {

TokenScore score_token(std::span<const float> ref, std::span<const float> logits, int target) {
    const auto top_ref = std::ranges::max_element(ref), top = std::ranges::max_element(logits);
    const double max_ref = *top_ref, max = *top;
    // With r and l the logits, Z their partition sums: KL = sum_i p_i (r_i - l_i) - (ln Z_r - ln Z_l). One pass, no stored probabilities.
    double z_ref = 0, z = 0, weighted = 0;
    for (std::size_t i = 0; i < ref.size(); i++) {
        const double r = ref[i], l = logits[i], e = std::exp(r - max_ref);
        z_ref += e;
        z += std::exp(l - max);
        if (e > 0) weighted += e * (r - l);
    }
    const double log_z_ref = max_ref + std::log(z_ref), log_z = max + std::log(z);
    TokenScore s;
    s.kld = weighted / z_ref - (log_z_ref - log_z);
    if (s.kld < 0) s.kld = 0;  // rounding; KL is never negative (and a NaN stays one)
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
    double nll = 0, nll_ref = 0, sum = 0;
    std::size_t same = 0;
    for (const TokenScore& t : scores) {
        nll += t.nll, nll_ref += t.nll_ref, sum += t.kld, same += t.same_top;
        kld.push_back(t.kld);
    }
    const auto n = static_cast<double>(scores.size());
    std::ranges::sort(kld);
    s.ppl = std::exp(nll / n), s.ppl_ref = std::exp(nll_ref / n);
    s.mean_kld = sum / n;
    s.median_kld = quantile(kld, 0.5), s.kld_99 = quantile(kld, 0.99), s.kld_999 = quantile(kld, 0.999);
    s.same_top = static_cast<double>(same) / n;
    s.tokens = scores.size();
    return s;
}

}  // namespace turboquant::measure
