#include "turboquant/cache/exact_rows.h"

#include <algorithm>
#include <bit>
#include <map>

#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {

void round_row(Side side, std::span<float> x) {
    for (float& f : x) {  // to nearest, ties to even
        const auto u = std::bit_cast<std::uint32_t>(f);
        const float normal = std::bit_cast<float>((u + 0xfff + (u >> 13 & 1)) & ~0x1fffu);
        const float small = (f + 0.75f) - 0.75f;  // multiples of 2^-24
        f = (u & 0x7fffffff) < 0x38800000 ? small : normal;
    }
    if (side == Side::value) return;
    std::uint16_t tagged[kTagValues];
    const std::size_t m = std::min(x.size(), kTagValues);
    std::transform(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(m), tagged, to_half);
    clear_tag({tagged, m});
    if (x.size() >= 64) std::transform(tagged, tagged + m, x.begin(), from_half);
}

std::size_t ExactRows::full_bytes() const {
    return static_cast<std::size_t>(windows_.bits(n_cells_, static_cast<std::int64_t>(n_embd()))) / 8 * n_streams_;
}

void ExactRows::resize(std::size_t n_slots) {
    slots_.resize(n_slots, -1);
    written_.resize(n_slots);
    values_.resize(n_slots * n_embd());
}

/// A free slot from `from` on, or a new one.
std::size_t ExactRows::take_slot(std::int64_t row, std::size_t from) {
    const auto slot =
        static_cast<std::size_t>(std::find(slots_.begin() + static_cast<std::ptrdiff_t>(from), slots_.end(), -1) - slots_.begin());
    if (slot == slots_.size()) resize(slot + 1);
    slots_[slot] = row;
    written_[slot] = clock_;
    return slot;
}

void ExactRows::round(const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells,
                      std::vector<float>& out) const {
    std::map<Sequence, std::int32_t> last;
    for (const std::int64_t row : rows) {
        std::int32_t& pos = last.try_emplace(sequence(row, cells), -1).first->second;
        pos = std::max(pos, cells.at(row));
    }
    out.resize(rows.size() * n_embd());
    for (std::size_t i = 0; i < rows.size(); i++) {
        const std::span<float> row = std::span(out).subspan(i * n_embd(), n_embd());
        std::copy_n(x + i * stride, n_embd(), row.begin());
        const std::int32_t pos = cells.at(rows[i]);
        if (pos < windows_.sink || pos > last.at(sequence(rows[i], cells)) - windows_.recent) round_row(side_, row);
    }
}

void ExactRows::add(const Kernels& k, const float* x, std::span<const std::int64_t> rows, const CellPositions& cells) {
    std::map<Sequence, std::int32_t> first;  // position of the batch's first token
    for (const std::int64_t row : rows)
        if (cells.at(row) >= 0) {
            const auto [at, is_new] = first.try_emplace(sequence(row, cells), cells.at(row));
            if (!is_new) at->second = std::min(at->second, cells.at(row));
        }
    // The batch's own rows have their new positions, so they go, too, and are written again.
    for (std::int64_t& row : slots_) {
        if (row < 0) continue;
        const auto at = cells.at(row) >= 0 ? first.find(sequence(row, cells)) : first.end();
        if (cells.at(row) < 0 || (at != first.end() && cells.at(row) >= at->second)) row = -1;
    }
    clock_++;
    values_.reserve((slots_.size() + rows.size()) * n_embd());
    std::size_t next = 0;
    for (std::size_t i = 0; i < rows.size(); i++)
        if (cells.at(rows[i]) >= 0) to_halves(k, x + i * n_embd(), n_embd(), at(next = take_slot(rows[i], next)));
}

void ExactRows::put(const Kernels& k, const float* x, std::int64_t row) {
    forget(row, 1);
    clock_++;
    to_halves(k, x, n_embd(), at(take_slot(row, 0)));
}

std::optional<std::vector<float>> ExactRows::find(std::int64_t row) const {
    const auto at = std::find(slots_.begin(), slots_.end(), row);
    if (at == slots_.end()) return std::nullopt;
    std::vector<float> x(n_embd());
    const auto halves = values(static_cast<std::size_t>(at - slots_.begin()));
    std::transform(halves.begin(), halves.end(), x.begin(), from_half);
    return x;
}

void ExactRows::trim(const CellPositions& cells) {
    struct State {
        std::int32_t last = -1;
        std::uint64_t written = 0;
    };
    std::map<Sequence, State> sequences;
    for (std::size_t s = 0; s < slots_.size(); s++)
        if (slots_[s] >= 0) {
            State& q = sequences[sequence(slots_[s], cells)];
            q.last = std::max(q.last, cells.at(slots_[s]));
            q.written = std::max(q.written, written_[s]);
        }
    std::vector<std::uint64_t> times;
    for (const auto& [key, q] : sequences) times.push_back(q.written);
    std::sort(times.rbegin(), times.rend());
    const auto most = static_cast<std::size_t>(std::max<std::int64_t>(kMaxSequences, n_streams_));
    const std::uint64_t oldest = times.size() > most ? times[most - 1] : 0;

    std::size_t live = 0;
    for (std::size_t s = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0) continue;
        const State& q = sequences[sequence(slots_[s], cells)];
        const std::int32_t pos = cells.at(slots_[s]);
        // One more than the next query wants, which counts itself: the last token may be taken back and asked again (llama-server does so
        // with a restored slot).
        if (pos < 0 || q.written < oldest || (pos >= windows_.sink && pos <= q.last - windows_.recent))
            slots_[s] = -1;
        else
            live++;
    }
    // Close up, to take no more memory than the windows.
    if (slots_.size() <= live + 1) return;
    for (std::size_t s = live, to = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0) continue;
        while (slots_[to] >= 0) to++;
        std::copy_n(values_.begin() + static_cast<std::ptrdiff_t>(s * n_embd()), n_embd(),
                    values_.begin() + static_cast<std::ptrdiff_t>(to * n_embd()));
        slots_[to] = slots_[s], written_[to] = written_[s];
    }
    resize(live);
    values_.shrink_to_fit();
}

void ExactRows::forget(std::int64_t first, std::int64_t n) {
    for (std::int64_t& row : slots_)
        if (row >= first && row < first + n) row = -1;
}

void ExactRows::clear() {
    resize(0);
    values_.shrink_to_fit();
}

void ExactRows::copy_stream(std::int64_t src, std::int64_t dst) {
    if (src == dst) return;
    forget(dst * n_cells_, n_cells_);
    for (std::size_t s = 0, n = slots_.size(); s < n; s++) {
        if (slots_[s] < 0 || slots_[s] / n_cells_ != src) continue;
        const std::size_t to = take_slot(slots_[s] + (dst - src) * n_cells_, n);
        written_[to] = written_[s];
        std::copy_n(values_.begin() + static_cast<std::ptrdiff_t>(s * n_embd()), n_embd(),
                    values_.begin() + static_cast<std::ptrdiff_t>(to * n_embd()));
    }
}

void ExactRows::rotate(const RopeParams& rope, std::span<const std::int32_t> shift) {
    std::vector<float> table(rope.n_dims);
    for (std::size_t s = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0 || static_cast<std::size_t>(slots_[s]) >= shift.size() || shift[slots_[s]] == 0) continue;
        rope_table(rope, static_cast<float>(shift[slots_[s]]), table);
        std::vector<float> x = *find(slots_[s]);
        for (int h = 0; h < n_head_; h++) rope_apply(rope, table, std::span(x).subspan(static_cast<std::size_t>(h) * head_dim_, head_dim_));
        std::transform(x.begin(), x.end(), at(s), to_half);
    }
}

}  // namespace turboquant
