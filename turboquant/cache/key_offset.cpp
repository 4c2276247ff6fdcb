#include "turboquant/cache/key_offset.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <stdexcept>
#include <string>

#include "turboquant/attention/turns.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/fnv.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant {
namespace {

static_assert(kTurnRadix * kTurnRadix * kTurnRadix * kTurnRadix == CellPositions::kMaxPosition && kTurnDigits == 4);

/// FNV-1a, never 0.
std::uint32_t hash_letters(std::string_view letters) {
    Fnv1a<std::uint32_t> hash;
    hash.add_all(letters);
    return hash.value() ? hash.value() : 1;
}

}  // namespace

std::shared_ptr<const KeyOffset::Turns> KeyOffset::shared_turns(const std::vector<double>& frequencies) {
    static std::mutex mutex;
    static std::vector<std::weak_ptr<const Turns>> known;
    const std::lock_guard lock(mutex);
    std::erase_if(known, [](const auto& t) { return t.expired(); });
    for (const auto& t : known)
        if (auto turns = t.lock(); turns && turns->frequencies == frequencies) return turns;
    const auto turns = std::make_shared<const Turns>(Turns{frequencies, make_turns(frequencies)});
    known.push_back(turns);
    return turns;
}

KeyOffset::KeyOffset(int n_head, int head_dim) : n_head_(n_head), head_dim_(head_dim), turns_(shared_turns({0})) {}

void KeyOffset::set_rope(const RopeParams& rope) {
    rope_ = rope;
    if (rope.freq_factors) {
        freq_factors_.assign(rope.freq_factors, rope.freq_factors + rope.n_dims / 2);
        rope_.freq_factors = freq_factors_.data();
    }
    has_rope_ = true;
    std::vector<double> frequencies = rope_frequencies(rope_);
    frequencies.resize(n_freq());  // a frequency of zero for the dims that are left alone
    turns_ = shared_turns(frequencies);
    for (Entry& e : entries_) set_mu_perp(e);
    version_++;
}

void KeyOffset::set_scales(std::string_view letters) {
    std::vector<float> scales = parse_scales(letters);
    const auto n = static_cast<std::size_t>(n_head_) * head_dim_;
    if (scales.size() != n)
        throw std::invalid_argument("the plan has scales for " + std::to_string(scales.size()) + " key channels, the cache has " +
                                    std::to_string(n) + ": it was made for another model");
    scales_ = std::move(scales);
    letters_ = letters;
    scale_hash_ = hash_letters(letters);
    for (Entry& e : entries_) set_mu_perp(e);
    version_++;
}

void KeyOffset::check_scales() const {
    if (!scaled()) return;
    if (!has_rope_)
        throw std::invalid_argument(
            "the plan has scales for keys without RoPE, or with one that was not found; take k_scales out of the plan");
    for (int h = 0; h < n_head_; h++)
        for (int i = 0; i < rope_.n_dims / 2; i++) {
            const auto [x, y] = rope_pair(rope_, i);
            if (scales(h)[x] != scales(h)[y])
                throw std::invalid_argument("the plan scales channels " + std::to_string(x) + " and " + std::to_string(y) +
                                            " differently, but RoPE turns them into each other; make the plan again");
        }
}

void KeyOffset::begin(int id, std::uint32_t generation) {
    if (entries_.size() <= static_cast<std::size_t>(id)) entries_.resize(id + 1);
    Entry& e = entries_[id];
    if (e.generation == generation && !e.mu.empty()) return;
    if (e.state == State::frozen) here(id);  // it is remembered
    e = {};
    e.generation = generation;
    e.mu.resize(static_cast<std::size_t>(n_head_) * head_dim_);
    set_mu_perp(e);
    version_++;
}

/// An entry with its mu.
const KeyOffset::Entry& KeyOffset::here(int id) const {
    Entry& e = entries_[id];
    if (!e.away) return e;
    std::vector<std::uint16_t> mu(e.mu.size());
    fetch_mu_(id, mu.data());
    e.away = false;
    std::transform(mu.begin(), mu.end(), e.mu.begin(), from_half);
    set_mu_perp(e);
    if (e.state == State::frozen) set_frozen(e, std::move(mu));
    return e;
}

std::vector<std::uint16_t> KeyOffset::mu_halves(int id) const {
    const std::vector<float>& mu = here(id).mu;
    std::vector<std::uint16_t> h(mu.size());
    std::transform(mu.begin(), mu.end(), h.begin(), to_half);
    return h;
}

void KeyOffset::freeze(int id, std::span<const std::uint16_t> mu) {
    Entry& e = entries_[id];
    std::transform(mu.begin(), mu.end(), e.mu.begin(), from_half);
    e.away = false;
    set_frozen(e, {mu.begin(), mu.end()});
    set_mu_perp(e);
    version_++;
}

void KeyOffset::set_frozen(Entry& e, std::vector<std::uint16_t> mu) const {
    e.state = State::frozen;
    e.hash = hash_mu(mu);
    if (known(e.hash)) return;
    if (remembered_.size() == kRemembered) remembered_.pop_front();
    remembered_.emplace_back(e.hash, std::move(mu));
}

const std::vector<std::uint16_t>* KeyOffset::recall(std::uint32_t hash) const {
    for (std::size_t id = 0; id < entries_.size(); id++)
        if (entries_[id].state == State::frozen) here(static_cast<int>(id));
    return known(hash);
}

const std::vector<std::uint16_t>* KeyOffset::known(std::uint32_t hash) const {
    for (const auto& [of, mu] : remembered_)
        if (of == hash) return &mu;
    return nullptr;
}

void KeyOffset::expect(int id, std::uint32_t hash) {
    Entry& e = entries_[id];
    e.state = State::expected, e.away = false;
    e.hash = hash;
}

void KeyOffset::freeze_all() {
    for (std::size_t id = 0; id < entries_.size(); id++) {
        Entry& e = entries_[id];
        if (e.state != State::measuring || e.measured == 0) continue;
        set_frozen(e, mu_halves(static_cast<int>(id)));
        e.kept.clear();
    }
}

const KeptRow* KeyOffset::find_kept(int id, std::int64_t row, std::int32_t pos) const {
    const std::vector<KeptRow>& kept = complete(id);
    auto found = std::lower_bound(kept.begin(), kept.end(), pos, [](const KeptRow& r, std::int32_t p) { return r.pos < p; });
    for (; found != kept.end() && found->pos == pos; ++found)
        if (found->row == row) return &*found;
    return nullptr;
}

const std::vector<KeptRow>& KeyOffset::complete(int id) const {
    std::vector<KeptRow>& kept = entries_[id].kept;
    std::vector<std::int32_t> places;
    for (const KeptRow& r : kept)
        if (r.values.empty()) places.push_back(r.place);
    if (places.empty()) return kept;
    const std::size_t n = entries_[id].mu.size();
    std::vector<std::uint16_t> rows(places.size() * n);
    fetch_(places, rows.data());
    const std::uint16_t* at = rows.data();
    for (KeptRow& r : kept) {
        if (!r.values.empty()) continue;
        r.values.assign(at, at + n), r.place = -1, at += n;
        clear_tag(r.values);
    }
    return kept;
}

/// values(i, kept row) for those that are kept.
template <class Values>
void KeyOffset::take_in(Entry& e, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos,
                        std::span<const std::uint8_t> beside, Values&& values) {
    for (std::size_t i = 0; i < rows.size(); i++) {
        const std::int32_t end = pos[i] + (!beside.empty() && beside[i]);
        const auto at = std::lower_bound(e.kept.begin(), e.kept.end(), end, [](const KeptRow& r, std::int32_t p) { return r.pos < p; });
        e.kept.erase(at, e.kept.end());
        if (e.kept.size() < e.summed) e.summed = 0;
        if (e.kept.size() >= kMeasureRows) continue;
        e.kept.push_back({rows[i], pos[i], {}});
        values(i, e.kept.back());
    }
}

void KeyOffset::note(int id, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside,
                     std::vector<std::int32_t>& places) {
    places.assign(rows.size(), -1);
    std::vector<bool> taken;
    for (const Entry& e : entries_)
        for (const KeptRow& r : e.kept)
            if (r.place >= 0) taken.resize(std::max(taken.size(), static_cast<std::size_t>(r.place) + 1)), taken[r.place] = true;
    std::size_t next = 0;
    take_in(entries_[id], rows, pos, beside, [&](std::size_t i, KeptRow& row) {
        while (next < taken.size() && taken[next]) next++;
        places[i] = row.place = static_cast<std::int32_t>(next++);
    });
}

bool KeyOffset::observe(int id, const float* keys, std::size_t stride, std::span<const std::int64_t> rows,
                        std::span<const std::int32_t> pos, std::span<const std::uint8_t> beside) {
    Entry& e = entries_[id];
    if (e.state != State::measuring) return false;
    take_in(e, rows, pos, beside, [&](std::size_t i, KeptRow& row) {
        row.values.resize(e.mu.size());
        std::transform(keys + i * stride, keys + i * stride + e.mu.size(), row.values.begin(), to_half);
        clear_tag(row.values);
    });
    return remeasure(id);
}

bool KeyOffset::due(int id) const { return measurable(at(id)) != at(id).measured; }

bool KeyOffset::remeasure(int id) {
    Entry& e = entries_[id];
    if (!due(id)) return false;
    const std::size_t n = e.measured = measurable(e);
    complete(id);
    e.away = false;
    measure(e);
    if (n >= kMeasureRows) set_frozen(e, mu_halves(id));
    return true;
}

std::span<const KeptRow> KeyOffset::kept_aside(int id) const {
    const std::vector<KeptRow>& kept = at(id).kept;
    if (std::ranges::any_of(kept, [](const KeptRow& r) { return r.place < 0; })) return {};
    return kept;
}

bool KeyOffset::remeasure_aside(int id, std::size_t& n) {
    Entry& e = entries_[id];
    if (kept_aside(id).empty() || !due(id)) return false;
    n = measurable(e);
    e.measured = n, e.away = true;
    if (n >= kMeasureRows) e.state = State::frozen;  // the rest when mu is here
    return true;
}

void KeyOffset::measure(Entry& e) {
    if (e.summed > e.measured) e.summed = 0;
    if (e.summed == 0) e.sum.assign(e.mu.size(), 0);
    std::vector<double>& sum = e.sum;
    std::vector<float> turn(2 * turn_width(n_freq())), x(head_dim_);
    const float magnitude = has_rope_ ? rope_magnitude(rope_) : 1;
    for (; e.summed < e.measured; e.summed++) {
        const KeptRow& r = e.kept[e.summed];
        turn_row(turns(), n_freq(), r.pos, turn.data());
        const float *c = turn.data(), *s = c + turn_width(n_freq());
        for (int h = 0; h < n_head_; h++) {
            std::transform(r.values.begin() + h * head_dim_, r.values.begin() + (h + 1) * head_dim_, x.begin(), from_half);
            for (int j = 0; has_rope_ && j < rope_.n_dims / 2; j++) {
                const auto [ia, ib] = rope_pair(rope_, j);
                const float a = x[ia], b = x[ib];
                x[ia] = (a * c[j] + b * s[j]) / magnitude;
                x[ib] = (b * c[j] - a * s[j]) / magnitude;
            }
            for (int j = 0; j < head_dim_; j++) sum[h * head_dim_ + j] += x[j];
        }
    }
    // Rounded to fp16, in which it travels with saved rows.
    for (std::size_t i = 0; i < e.mu.size(); i++)
        e.mu[i] = from_half(to_half(static_cast<float>(sum[i] / static_cast<double>(e.measured))));
    set_mu_perp(e);
    version_++;
}

void KeyOffset::set_mu_perp(Entry& e) const {
    e.mu_perp.assign(2 * e.mu.size(), 0.0f);
    const float magnitude = has_rope_ ? rope_magnitude(rope_) : 1;
    for (int h = 0; h < n_head_; h++) {
        const float* mu = e.mu.data() + h * head_dim_;
        float *value = e.mu_perp.data() + 2 * h * head_dim_, *perp = value + head_dim_;
        std::copy_n(mu, head_dim_, value);
        for (int i = 0; has_rope_ && i < rope_.n_dims / 2; i++) {
            const auto [x, y] = rope_pair(rope_, i);
            value[x] = perp[y] = magnitude * mu[x];
            value[y] = magnitude * mu[y];
            perp[x] = -value[y];
        }
        for (int i = 0; scaled() && i < head_dim_; i++) value[i] *= scales(h)[i], perp[i] *= scales(h)[i];
    }
}

void KeyOffset::release_kept(int id) {
    if (frozen(id)) std::vector<KeptRow>().swap(entries_[id].kept);
}

RopeTable KeyOffset::rope_table() const {
    return {turns(), n_freq(), has_rope_ ? rope_.n_dims : 0, rope_.n_offset, rope_.pairs, turns_->frequencies};
}

KeyTransform KeyOffset::transform(const CellPositions& cells) const {
    KeyTransform t;
    t.cells = cells.packed().data();
    for (std::size_t id = 0; id < entries_.size(); id++) t.mu[id] = entries_[id].away ? nullptr : entries_[id].mu_perp.data();
    t.rope = rope_table();
    t.magnitude = has_rope_ ? rope_magnitude(rope_) : 1;
    t.scales = scaled() ? scales_.data() : nullptr;
    t.version = version_;
    return t;
}

void KeyOffset::add_offset(int id, std::span<float> x, std::int32_t pos) const {
    if (pos >= 0) {
        std::vector<float> turn(2 * head_dim_);
        spread_turn(rope_table(), head_dim_, pos, turn.data());
        for (int h = 0; h < n_head_; h++) {
            const float* mu = here(id).mu_perp.data() + 2 * h * head_dim_;
            for (int i = 0; i < head_dim_; i++) x[h * head_dim_ + i] += turned(mu, turn.data(), head_dim_, i);
        }
    }
    for (std::size_t i = 0; i < scales_.size(); i++) x[i] /= scales_[i];
}

}  // namespace turboquant
