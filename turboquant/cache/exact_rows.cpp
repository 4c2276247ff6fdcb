#include "turboquant/cache/exact_rows.h"

#include <algorithm>
#include <bit>
#include <map>

#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {

void round_rows(Side side, const float* x, std::size_t stride, std::size_t n, std::size_t n_embd, std::vector<float>& out) {
    out.resize(n * n_embd);
    for (std::size_t i = 0; i < n; i++) {
        const float* from = x + i * stride;
        float* to = out.data() + i * n_embd;
        for (std::size_t j = 0; j < n_embd; j++) {  // to nearest, ties to even
            const auto u = std::bit_cast<std::uint32_t>(from[j]);
            const float normal = std::bit_cast<float>((u + 0xfff + (u >> 13 & 1)) & ~0x1fffu);
            const float small = (from[j] + 0.75f) - 0.75f;  // multiples of 2^-24
            to[j] = (u & 0x7fffffff) < 0x38800000 ? small : normal;
        }
        if (side == Side::value) continue;
        std::uint16_t tagged[kTagValues];
        const std::size_t m = std::min(n_embd, kTagValues);
        std::transform(to, to + m, tagged, to_half);
        clear_tag({tagged, m});
        if (n_embd >= 64) std::transform(tagged, tagged + m, to, from_half);
    }
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

void ExactRows::write(std::size_t slot, const float* x) {
    std::transform(x, x + n_embd(), values_.begin() + static_cast<std::ptrdiff_t>(slot * n_embd()), to_half);
}

void ExactRows::add(const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells) {
    // Position of the batch's first token of each sequence: a copy of a stream keeps its offset ids.
    std::map<std::pair<std::int64_t, int>, std::int32_t> first;
    const auto of = [&](std::int64_t row) { return std::pair(row / n_cells_, cells.offset_id(row)); };
    for (const std::int64_t row : rows)
        if (cells.at(row) >= 0) {
            const auto [at, is_new] = first.try_emplace(of(row), cells.at(row));
            if (!is_new) at->second = std::min(at->second, cells.at(row));
        }
    // The batch's own rows have their new positions, so they go, too, and are written again.
    for (std::int64_t& row : slots_) {
        if (row < 0) continue;
        const auto at = cells.at(row) >= 0 ? first.find(of(row)) : first.end();
        if (cells.at(row) < 0 || (at != first.end() && cells.at(row) >= at->second)) row = -1;
    }
    clock_++;
    std::size_t next = 0;
    for (std::size_t i = 0; i < rows.size(); i++)
        if (cells.at(rows[i]) >= 0) write(next = take_slot(rows[i], next), x + i * stride);
}

void ExactRows::put(const float* x, std::int64_t row) {
    forget(row, 1);
    clock_++;
    write(take_slot(row, 0), x);
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
    struct Sequence {
        std::int32_t last = -1;
        std::uint64_t written = 0;
    };
    std::map<std::pair<std::int64_t, int>, Sequence> sequences;
    const auto of = [&](std::int64_t row) { return std::pair(row / n_cells_, cells.offset_id(row)); };
    for (std::size_t s = 0; s < slots_.size(); s++)
        if (slots_[s] >= 0) {
            Sequence& q = sequences[of(slots_[s])];
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
        const Sequence& q = sequences[of(slots_[s])];
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
        write(s, x.data());
    }
}

}  // namespace turboquant
