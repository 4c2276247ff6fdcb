#include "turboquant/cache/key_offset.h"

#include <algorithm>

#include "turboquant/codec/quantizer.h"

namespace turboquant {

void KeyOffset::set_rope(const RopeParams& rope) {
    rope_ = rope;
    if (rope.freq_factors) {
        freq_factors_.assign(rope.freq_factors, rope.freq_factors + rope.n_dims / 2);
        rope_.freq_factors = freq_factors_.data();
    }
    has_rope_ = true;
}

std::vector<std::uint16_t> KeyOffset::mu_halves() const {
    std::vector<std::uint16_t> h(mu_.size());
    std::transform(mu_.begin(), mu_.end(), h.begin(), to_half);
    return h;
}

void KeyOffset::freeze(std::span<const std::uint16_t> mu) {
    std::transform(mu.begin(), mu.end(), mu_.begin(), from_half);
    frozen_ = true;
}

void KeyOffset::reset() {
    std::fill(mu_.begin(), mu_.end(), 0.0f);
    frozen_ = false;
}

void KeyOffset::measure(std::span<const FirstRows::Row> rows) {
    if (frozen_) return;
    std::vector<double> sum(mu_.size());
    std::vector<float> table(rope_.n_dims), x(head_dim_);
    std::size_t n = 0;
    for (const FirstRows::Row& r : rows) {
        if (r.pos < 0) continue;
        n++;
        // Un-rotate by the transpose; a magnitude factor (YaRN) divides out through its square.
        float norm = 1;
        if (has_rope_) {
            rope_table(rope_, static_cast<float>(r.pos), table);
            norm = table[0] * table[0] + table[1] * table[1];
            for (int i = 1; i < rope_.n_dims; i += 2) table[i] = -table[i];
        }
        for (int h = 0; h < n_head_; h++) {
            std::transform(r.values.begin() + h * head_dim_, r.values.begin() + (h + 1) * head_dim_, x.begin(), from_half);
            if (has_rope_) {
                rope_apply(rope_, table, x);
                for (int i = 0; i < rope_.n_dims; i++) x[rope_.n_offset + i] /= norm;
            }
            for (int i = 0; i < head_dim_; i++) sum[h * head_dim_ + i] += x[i];
        }
    }
    // Rounded to fp16, in which it travels with saved rows.
    for (std::size_t i = 0; i < mu_.size(); i++)
        mu_[i] = from_half(to_half(static_cast<float>(sum[i] / static_cast<double>(std::max<std::size_t>(n, 1)))));
}

void KeyOffset::query_terms(std::span<const float> q, int head, std::span<float> terms) const {
    const float* mu = mu_.data() + static_cast<std::ptrdiff_t>(head) * head_dim_;
    const int pairs = has_rope_ ? rope_.n_dims / 2 : 0, n = n_freq();
    std::fill(terms.begin(), terms.end(), 0.0f);
    for (int i = 0; i < pairs; i++) {
        const auto [x, y] = rope_pair(rope_, i);
        terms[i] = q[x] * mu[x] + q[y] * mu[y];
        terms[n + i] = q[y] * mu[x] - q[x] * mu[y];
    }
    if (n > pairs)
        for (int i = 0; i < head_dim_; i++)
            if (!has_rope_ || i < rope_.n_offset || i >= rope_.n_offset + rope_.n_dims) terms[pairs] += q[i] * mu[i];
}

void KeyOffset::trig_row(std::int32_t pos, std::span<float> row) const {
    const int pairs = has_rope_ ? rope_.n_dims / 2 : 0, n = n_freq();
    std::vector<float> table(2 * pairs);
    if (has_rope_) rope_table(rope_, static_cast<float>(pos), table);
    for (int i = 0; i < pairs; i++) row[i] = table[2 * i], row[n + i] = table[2 * i + 1];
    if (n > pairs) row[pairs] = 1, row[n + pairs] = 0;
}

void KeyOffset::remove(std::span<float> x, std::int32_t pos, float sign) const {
    if (pos < 0) return;
    std::vector<float> shift(mu_.begin(), mu_.end()), table(rope_.n_dims);
    if (has_rope_) {
        rope_table(rope_, static_cast<float>(pos), table);
        for (int h = 0; h < n_head_; h++) rope_apply(rope_, table, std::span(shift).subspan(h * head_dim_, head_dim_));
    }
    for (std::size_t i = 0; i < shift.size(); i++) x[i] -= sign * shift[i];
}

}  // namespace turboquant
