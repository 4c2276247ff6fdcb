#include "turboquant/measure/kv_statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace turboquant::measure {
namespace {

double median(std::vector<double> x) {
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    std::ranges::nth_element(x, middle);
    return *middle;
}

}  // namespace

std::optional<double> LayerStatistics::ratio() const { return v && v->norm > 0 ? std::optional(k.norm / v->norm) : std::nullopt; }

void KvStatistics::add(const llama::KvRows& rows) {
    Sums& s = sums_[{rows.layer, rows.source}];
    const auto d = static_cast<std::size_t>(rows.head_dim), heads = static_cast<std::size_t>(rows.n_heads);
    s.head_dim = rows.head_dim, s.n_heads = rows.n_heads, s.tokens += rows.n_tokens;
    s.sum.resize(heads * d), s.square.resize(heads * d), s.norm.resize(heads);
    for (int t = 0; t < rows.n_tokens; t++)
        for (std::size_t h = 0; h < heads; h++) {
            const std::span<const float> x = rows.row(t, static_cast<int>(h));
            double norm2 = 0;
            for (std::size_t i = 0; i < d; i++) {
                const double square = static_cast<double>(x[i]) * x[i];
                norm2 += square;
                s.sum[h * d + i] += x[i], s.square[h * d + i] += square;
            }
            s.norm[h] += std::sqrt(norm2);
        }
}

SideStatistics KvStatistics::side(const Sums& s, double outlier_ratio) {
    SideStatistics r;
    const auto n = static_cast<double>(s.tokens);
    for (const double x : s.norm) r.norm_heads.push_back(x / n);
    r.norm = std::accumulate(r.norm_heads.begin(), r.norm_heads.end(), 0.0) / s.n_heads;
    std::vector<double> rms;
    for (const double x : s.square) rms.push_back(std::sqrt(x / n));
    r.max_rms = std::ranges::max(rms), r.median_rms = median(rms);
    std::ptrdiff_t outliers = 0;
    for (auto head = rms.begin(); head != rms.end(); head += s.head_dim) {
        const double limit = outlier_ratio * median({head, head + s.head_dim});
        outliers += std::count_if(head, head + s.head_dim, [&](double x) { return x > limit; });
    }
    r.outlier_share = static_cast<double>(outliers) / static_cast<double>(rms.size());
    return r;
}

std::vector<LayerStatistics> KvStatistics::layers(double outlier_ratio) const {
    std::vector<LayerStatistics> out;
    for (const auto& [key, keys] : sums_) {
        if (key.second != llama::KvSource::key || keys.tokens == 0) continue;
        LayerStatistics l;
        l.layer = key.first;
        l.k = side(keys, outlier_ratio);
        if (const auto v = sums_.find({l.layer, llama::KvSource::value}); v != sums_.end()) l.v = side(v->second, outlier_ratio);
        const auto before = sums_.find({l.layer, llama::KvSource::key_before_rope});
        const Sums& s = before != sums_.end() ? before->second : keys;
        double constant = 0, energy = 0;
        for (std::size_t i = 0; i < s.sum.size(); i++) {
            constant += std::pow(s.sum[i] / static_cast<double>(s.tokens), 2);
            energy += s.square[i] / static_cast<double>(s.tokens);
        }
        l.k_offset_share = energy > 0 ? constant / energy : 0;
        out.push_back(std::move(l));
    }
    return out;
}

std::vector<double> KvStatistics::key_variance(int layer) const {
    const auto found = sums_.find({layer, llama::KvSource::key_before_rope});
    std::vector<double> variance;
    if (found == sums_.end()) return variance;
    const auto n = static_cast<double>(found->second.tokens);
    for (std::size_t i = 0; i < found->second.sum.size(); i++)
        variance.push_back(std::max(0.0, found->second.square[i] / n - std::pow(found->second.sum[i] / n, 2)));
    return variance;
}

std::vector<double> KvStatistics::query_energy(int layer) const {
    const auto keys = sums_.find({layer, llama::KvSource::key}), queries = sums_.find({layer, llama::KvSource::query});
    if (keys == sums_.end() || queries == sums_.end() || queries->second.n_heads % keys->second.n_heads) return {};
    const Sums& q = queries->second;
    const auto d = static_cast<std::size_t>(q.head_dim), group = static_cast<std::size_t>(q.n_heads / keys->second.n_heads);
    std::vector<double> energy(q.square.size() / group);
    for (std::size_t i = 0; i < q.square.size(); i++)
        energy[i / (d * group) * d + i % d] += q.square[i] / static_cast<double>(q.tokens) / static_cast<double>(group);
    return energy;
}

}  // namespace turboquant::measure
