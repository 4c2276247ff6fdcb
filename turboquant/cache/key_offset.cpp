#include "turboquant/cache/key_offset.h"

#include <algorithm>
#include <bit>

#include "turboquant/cache/saved_row.h"
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

void KeyOffset::begin(int id, std::uint32_t generation) {
    if (entries_.size() <= static_cast<std::size_t>(id)) entries_.resize(id + 1);
    Entry& e = entries_[id];
    if (e.generation == generation && !e.mu.empty()) return;
    e = {};
    e.generation = generation;
    e.mu.resize(static_cast<std::size_t>(n_head_) * head_dim_);
}

std::vector<std::uint16_t> KeyOffset::mu_halves(int id) const {
    std::vector<std::uint16_t> h(at(id).mu.size());
    std::transform(at(id).mu.begin(), at(id).mu.end(), h.begin(), to_half);
    return h;
}

void KeyOffset::freeze(int id, std::span<const std::uint16_t> mu) {
    Entry& e = entries_[id];
    std::transform(mu.begin(), mu.end(), e.mu.begin(), from_half);
    e.frozen = true;
    e.expected = false;
    e.hash = hash_mu(mu);
}

void KeyOffset::expect(int id, std::uint32_t hash) {
    Entry& e = entries_[id];
    e.frozen = e.expected = true;
    e.hash = hash;
}

void KeyOffset::freeze_all() {
    for (std::size_t id = 0; id < entries_.size(); id++) {
        Entry& e = entries_[id];
        if (e.frozen || e.measured == 0) continue;
        e.frozen = true;
        e.hash = hash_mu(mu_halves(static_cast<int>(id)));
        e.kept.clear();
    }
}

const KeyOffset::Row* KeyOffset::find_kept(int id, std::int64_t row, std::int32_t pos) const {
    const std::vector<Row>& kept = at(id).kept;
    const auto found = std::lower_bound(kept.begin(), kept.end(), pos, [](const Row& r, std::int32_t p) { return r.pos < p; });
    return found != kept.end() && found->pos == pos && found->row == row ? &*found : nullptr;
}

bool KeyOffset::observe(int id, const float* keys, std::size_t stride, std::span<const std::int64_t> rows,
                        std::span<const std::int32_t> pos) {
    Entry& e = entries_[id];
    if (e.frozen) return false;
    for (std::size_t i = 0; i < rows.size(); i++) {
        const auto at = std::lower_bound(e.kept.begin(), e.kept.end(), pos[i], [](const Row& r, std::int32_t p) { return r.pos < p; });
        e.kept.erase(at, e.kept.end());
        if (e.kept.size() >= kMeasureRows) continue;
        Row row{rows[i], pos[i], std::vector<std::uint16_t>(e.mu.size())};
        std::transform(keys + i * stride, keys + i * stride + e.mu.size(), row.values.begin(), to_half);
        clear_tag(row.values);
        e.kept.push_back(std::move(row));
    }
    const std::size_t n = e.kept.empty() ? 0 : std::bit_floor(e.kept.size());
    if (n == e.measured) return false;
    e.measured = n;
    measure(e);
    if (n >= kMeasureRows) {
        e.frozen = true;
        e.hash = hash_mu(mu_halves(id));
    }
    return true;
}

void KeyOffset::measure(Entry& e) const {
    std::vector<double> sum(e.mu.size());
    std::vector<float> table(rope_.n_dims), x(head_dim_);
    for (std::size_t i = 0; i < e.measured; i++) {
        const Row& r = e.kept[i];
        // Un-rotate by the transpose; a magnitude factor (YaRN) divides out through its square.
        float norm = 1;
        if (has_rope_) {
            rope_table(rope_, static_cast<float>(r.pos), table);
            norm = table[0] * table[0] + table[1] * table[1];
            for (int j = 1; j < rope_.n_dims; j += 2) table[j] = -table[j];
        }
        for (int h = 0; h < n_head_; h++) {
            std::transform(r.values.begin() + h * head_dim_, r.values.begin() + (h + 1) * head_dim_, x.begin(), from_half);
            if (has_rope_) {
                rope_apply(rope_, table, x);
                for (int j = 0; j < rope_.n_dims; j++) x[rope_.n_offset + j] /= norm;
            }
            for (int j = 0; j < head_dim_; j++) sum[h * head_dim_ + j] += x[j];
        }
    }
    // Rounded to fp16, in which it travels with saved rows.
    for (std::size_t i = 0; i < e.mu.size(); i++)
        e.mu[i] = from_half(to_half(static_cast<float>(sum[i] / static_cast<double>(e.measured))));
}

void KeyOffset::settle(int id) {
    if (at(id).frozen) std::vector<Row>().swap(entries_[id].kept);
}

void KeyOffset::query_terms(int id, std::span<const float> q, int head, std::span<float> terms) const {
    const float* mu = at(id).mu.data() + static_cast<std::ptrdiff_t>(head) * head_dim_;
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

void KeyOffset::remove(int id, std::span<float> x, std::int32_t pos, float sign) const {
    if (pos < 0) return;
    std::vector<float> shift = at(id).mu, table(rope_.n_dims);
    if (has_rope_) {
        rope_table(rope_, static_cast<float>(pos), table);
        for (int h = 0; h < n_head_; h++) rope_apply(rope_, table, std::span(shift).subspan(h * head_dim_, head_dim_));
    }
    for (std::size_t i = 0; i < shift.size(); i++) x[i] -= sign * shift[i];
}

}  // namespace turboquant
