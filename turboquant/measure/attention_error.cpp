#include "turboquant/measure/attention_error.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "turboquant/codec/random.h"
#include "turboquant/measure/parallel.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant::measure {
namespace {

constexpr int kStride = 6;  ///< every so many positions' queries are looked at

/// Those of the last three quarters, where divergence is measured too.
bool kept(int position, int n_tokens) { return position >= n_tokens / 4 && position % kStride == 0; }

float dot(const float* a, const float* b, std::size_t n) {
    float lanes[8] = {};
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (std::size_t l = 0; l < 8; l++) lanes[l] += a[i + l] * b[i + l];
    float sum = 0;
    for (; i < n; i++) sum += a[i] * b[i];
    for (const float x : lanes) sum += x;
    return sum;
}

double quadratic(std::span<const float> x, const std::vector<float>* metric) {
    if (!metric) return dot(x.data(), x.data(), x.size());
    double sum = 0;
    for (std::size_t i = 0; i < x.size(); i++) sum += static_cast<double>(x[i]) * dot(metric->data() + i * x.size(), x.data(), x.size());
    return sum;
}

}  // namespace

AttentionErrors::AttentionErrors(const std::vector<llama::KvLayerShape>& shapes, bool offset, WindowSizes windows,
                                 llama::OutputWeights& weights)
    : offset_(offset), windows_(windows), weights_(&weights) {
    for (const llama::KvLayerShape& s : shapes)
        if (s.k_heads && s.v_heads == s.k_heads) layers_[s.layer].shape = s;
}

void AttentionErrors::add(const llama::KvRows& rows, int n_tokens) {
    const auto found = layers_.find(rows.layer);
    if (found == layers_.end()) return;
    Layer& l = found->second;
    const auto take = [&](std::vector<float>& to, int& count, bool all) {
        for (int t = 0; t < rows.n_tokens; t++)
            if (all || kept(count + t, n_tokens))
                for (int h = 0; h < rows.n_heads; h++) to.insert(to.end(), rows.row(t, h).begin(), rows.row(t, h).end());
        count += rows.n_tokens;
    };
    const auto take_squares = [&](std::vector<float>& to, int& count) {
        for (int t = 0; t < rows.n_tokens; t++)
            if (const std::span<const float> x = rows.row(t, 0); kept(count + t, n_tokens)) to.push_back(dot(x.data(), x.data(), x.size()));
        count += rows.n_tokens;
    };
    switch (rows.source) {
        case llama::KvSource::query:
            l.n_query_heads = rows.n_heads, take(l.q, l.q_tokens, false);
            break;
        case llama::KvSource::key:
            take(l.k, l.k_tokens, true);
            break;
        case llama::KvSource::key_before_rope:
            take(l.before, l.before_tokens, true);
            break;
        case llama::KvSource::value:
            take(l.v, l.v_tokens, true);
            break;
        case llama::KvSource::stream:
            take_squares(l.stream, l.stream_tokens);
            break;
        case llama::KvSource::stream_before:
            take_squares(l.stream_before, l.before_layer_tokens);
            break;
        case llama::KvSource::attention_normed:
            take_squares(l.normed, l.normed_tokens);
            break;
    }
}

std::vector<HeadError> AttentionErrors::heads(const std::map<int, std::string>& scales, int n_threads) const {
    struct Task {
        const Layer* layer;
        int head;
        const llama::OutputMetrics* metrics;
        std::string scales;
    };
    std::vector<Task> tasks;
    for (const auto& [number, l] : layers_) {
        const bool seen = l.q_tokens > 0 && l.q_tokens == l.k_tokens && l.q_tokens == l.v_tokens &&
                          (!l.shape.rope || l.before_tokens == l.q_tokens) && l.n_query_heads % l.shape.k_heads == 0;
        if (!seen) continue;
        const llama::OutputMetrics* metrics = &weights_->metrics(number, l.n_query_heads, l.shape.v_head_dim);
        const auto letters = scales.find(number);
        for (int h = 0; h < l.shape.k_heads; h++) tasks.push_back({&l, h, metrics, letters == scales.end() ? "" : letters->second});
    }
    std::vector<HeadError> out(tasks.size());
    parallel_for(tasks.size(), n_threads,
                 [&](std::size_t i) { out[i] = head_errors(*tasks[i].layer, tasks[i].head, *tasks[i].metrics, tasks[i].scales); });
    return out;
}

/// Of an error behind the output projection, squared: what a norm behind it makes of it (it makes `attention`, the whole output's square, normed),
/// beside the square of the stream that it is added to.
double AttentionErrors::reaching_share(const Layer& l, std::size_t kept, double attention) {
    const auto at = [kept](const std::vector<float>& x, double otherwise) {
        return kept < x.size() ? std::max(static_cast<double>(x[kept]), 1e-12) : otherwise;
    };
    const double normed = at(l.normed, 0), norm = normed > 0 ? normed / std::max(attention, 1e-12) : 1;
    return norm / at(l.stream, at(l.stream_before, 1));
}

HeadError AttentionErrors::head_errors(const Layer& l, int head, const llama::OutputMetrics& metrics, const std::string& scales) const {
    const auto dk = static_cast<std::size_t>(l.shape.k_head_dim), dv = static_cast<std::size_t>(l.shape.v_head_dim);
    const auto n_tokens = static_cast<std::size_t>(l.k_tokens), heads = static_cast<std::size_t>(l.shape.k_heads),
               h = static_cast<std::size_t>(head), n_query_heads = static_cast<std::size_t>(l.n_query_heads), group = n_query_heads / heads;
    const auto row = [heads, h](const std::vector<float>& x, std::size_t t, std::size_t d) { return x.data() + (t * heads + h) * d; };
    // What is encoded: keys without their offset, scaled. An error of relative square 1, evenly spread as rotation spreads it.
    const std::vector<float>& encoded = l.shape.rope ? l.before : l.k;
    std::vector<double> mean(dk, 0);
    if (offset_)
        for (std::size_t t = 0; t < n_tokens; t++)
            for (std::size_t i = 0; i < dk; i++) mean[i] += row(encoded, t, dk)[i] / static_cast<double>(n_tokens);
    std::vector<float> scale(dk, 1);
    if (const std::vector<float> all = parse_scales(scales); all.size() == heads * dk)
        std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(h * dk), dk, scale.begin());
    SplitMix64 random(static_cast<std::uint64_t>(l.shape.layer) * 1000 + h);
    std::vector<float> error(n_tokens * dk), keys(n_tokens * dk), values(n_tokens * dv), v_norm(n_tokens);
    for (std::size_t t = 0; t < n_tokens; t++) {
        double norm = 0;
        for (std::size_t i = 0; i < dk; i++) norm += std::pow((row(encoded, t, dk)[i] - mean[i]) * scale[i], 2);
        const double each = std::sqrt(norm / static_cast<double>(dk));
        for (std::size_t i = 0; i < dk; i++) error[t * dk + i] = static_cast<float>(each * random.normal() / scale[i]);
        std::copy_n(row(l.k, t, dk), dk, keys.data() + t * dk);
        std::copy_n(row(l.v, t, dv), dv, values.data() + t * dv);
        v_norm[t] = dot(row(l.v, t, dv), row(l.v, t, dv), dv);
    }
    const auto sink = static_cast<std::size_t>(windows_.sink), recent = static_cast<std::size_t>(windows_.recent);
    const std::size_t n_errors = std::size(kKeyErrors);
    std::vector<float> score(n_tokens), off(n_tokens), p(n_tokens), exact(dv), moved(dv);
    const auto attend = [&](std::size_t from, std::size_t to, float amount, std::vector<float>& o) {
        float top = -INFINITY, sum = 0;
        for (std::size_t j = from; j < to; j++) top = std::max(top, p[j] = score[j] + amount * off[j]);
        std::ranges::fill(o, 0);
        for (std::size_t j = from; j < to; j++) {
            sum += p[j] = std::exp(p[j] - top);
            for (std::size_t i = 0; i < dv; i++) o[i] += p[j] * values[j * dv + i];
        }
        for (std::size_t j = from; j < to; j++) p[j] /= sum;
        for (float& x : o) x /= sum;
    };
    const std::size_t n_kept = l.q.size() / (n_query_heads * dk);
    std::size_t kept_index = 0;
    std::vector<double> key_sum(n_errors, 0);
    double value_sum = 0;
    for (std::size_t t = 0; t < n_tokens; t++) {
        if (!kept(static_cast<int>(t), static_cast<int>(n_tokens))) continue;
        const std::size_t from =
            l.shape.window > 0 && t + 1 > static_cast<std::size_t>(l.shape.window) ? t + 1 - static_cast<std::size_t>(l.shape.window) : 0;
        double own = 0, values_here = 0;
        std::vector<double> keys_here(n_errors, 0);
        for (std::size_t g = 0; g < group; g++) {
            const std::size_t query_head = h * group + g;
            const float* q = l.q.data() + (kept_index * n_query_heads + query_head) * dk;
            const std::vector<float>* metric = metrics.empty() ? nullptr : &metrics[query_head];
            for (std::size_t j = from; j <= t; j++) {
                score[j] = l.shape.attention_scale * dot(q, keys.data() + j * dk, dk);
                const bool stored = j >= sink && j + recent <= t;
                off[j] = stored ? l.shape.attention_scale * dot(q, error.data() + j * dk, dk) : 0;
            }
            attend(from, t + 1, 0, exact);
            own += quadratic(exact, metric);
            double trace = 0;
            for (std::size_t i = 0; i < dv; i++) trace += metric ? (*metric)[i * dv + i] : 1;
            double spread = 0;
            for (std::size_t j = from; j <= t; j++)
                if (j >= sink && j + recent <= t) spread += static_cast<double>(p[j]) * p[j] * v_norm[j];
            values_here += spread * trace / static_cast<double>(dv);
            for (std::size_t e = 0; e < n_errors; e++) {
                attend(from, t + 1, static_cast<float>(std::sqrt(kKeyErrors[e])), moved);
                for (std::size_t i = 0; i < dv; i++) moved[i] -= exact[i];
                keys_here[e] += quadratic(moved, metric);
            }
        }
        const double share = reaching_share(l, kept_index++, own * static_cast<double>(heads));
        value_sum += values_here * share;
        for (std::size_t e = 0; e < n_errors; e++) key_sum[e] += keys_here[e] * share;
    }
    HeadError out{l.shape.layer, head, std::move(key_sum), value_sum / static_cast<double>(std::max<std::size_t>(1, n_kept))};
    for (double& x : out.keys) x /= static_cast<double>(std::max<std::size_t>(1, n_kept));
    return out;
}

}  // namespace turboquant::measure
