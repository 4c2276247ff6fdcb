#include "turboquant/cache/exact_rows.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

/// A value by sequence: few sequences, looked up in runs of the same one.
template <class T>
struct BySequence {
    std::vector<std::pair<std::int64_t, T>> all;
    std::size_t last = 0;

    T& at(std::int64_t sequence, const T& fresh) {
        if (last < all.size() && all[last].first == sequence) return all[last].second;
        for (last = 0; last < all.size(); last++)
            if (all[last].first == sequence) return all[last].second;
        all.push_back({sequence, fresh});
        return all.back().second;
    }
};

}  // namespace

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

void ExactRows::resize(std::size_t n_slots) {
    slots_.resize(n_slots, -1);
    n_slots_.store(n_slots, std::memory_order_relaxed);
    written_.resize(n_slots);
}

/// A free slot from `from` on, or a new one.
std::int32_t ExactRows::take_slot(std::int64_t row, std::size_t from) {
    const auto slot =
        static_cast<std::size_t>(std::find(slots_.begin() + static_cast<std::ptrdiff_t>(from), slots_.end(), -1) - slots_.begin());
    if (slot == slots_.size()) resize(slot + 1);
    slots_[slot] = row;
    written_[slot] = clock_ + 1;
    return static_cast<std::int32_t>(slot);
}

void ExactRows::kept_by_batch(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::uint8_t>& out) const {
    BySequence<std::int32_t> last;
    for (const std::int64_t row : rows) {
        std::int32_t& pos = last.at(sequence(row, cells), -1);
        pos = std::max(pos, cells.at(row));
    }
    out.resize(rows.size());
    for (std::size_t i = 0; i < rows.size(); i++) {
        const std::int32_t pos = cells.at(rows[i]);
        out[i] = pos < windows_.sink || pos > last.at(sequence(rows[i], cells), -1) - windows_.recent;
    }
}

/// All layers of a cache do the same with every batch: one works it out, the others, on the same thread, look it up among the last ones.
struct ExactRows::Steps {
    std::array<Step, 4> all;  // caches of several kinds take turns
    std::size_t next = 0;
};

template <class Do>
const ExactRows::Step& ExactRows::once(Steps& steps, const CellPositions& cells, std::span<const std::int64_t> rows, Do&& act) {
    for (const Step& s : steps.all) {
        if (s.cells != cells.serial() || s.version != cells.version() || !(s.windows == windows_) || s.n_streams != n_streams_ ||
            s.spare != spare_ || s.clock_before != clock_ || s.slots_before != slots_ || s.written_before != written_ ||
            !std::ranges::equal(s.rows, rows))
            continue;
        slots_ = s.slots_after, written_ = s.written_after;
        n_slots_.store(slots_.size(), std::memory_order_relaxed);
        return s;
    }
    Step& s = steps.all[steps.next++ % steps.all.size()];
    s.cells = cells.serial(), s.version = cells.version(), s.windows = windows_, s.n_streams = n_streams_, s.spare = spare_;
    s.rows.assign(rows.begin(), rows.end());
    s.clock_before = clock_, s.slots_before = slots_, s.written_before = written_;
    act(s);
    s.slots_after = slots_, s.written_after = written_;
    return s;
}

void ExactRows::add(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::int32_t>& slots) {
    thread_local Steps steps;
    slots = once(steps, cells, rows, [&](Step& s) { add_now(rows, cells, s.taken); }).taken;
    clock_++;
}

void ExactRows::make_way(std::span<const std::int64_t> rows, const CellPositions& cells) {
    constexpr std::int32_t kNone = std::numeric_limits<std::int32_t>::max();
    BySequence<std::int32_t> first;  // position of the batch's first token
    for (const std::int64_t row : rows)
        if (cells.at(row) >= 0) {
            std::int32_t& pos = first.at(sequence(row, cells), kNone);
            pos = std::min(pos, cells.at(row));
        }
    // The batch's own rows have their new positions, so they go, too, and are written again.
    for (std::int64_t& row : slots_)
        if (row >= 0 && (cells.at(row) < 0 || cells.at(row) >= first.at(sequence(row, cells), kNone))) row = -1;
}

void ExactRows::add_now(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::int32_t>& slots) {
    make_way(rows, cells);
    slots.assign(rows.size(), -1);
    std::size_t next = 0;
    for (std::size_t i = 0; i < rows.size(); i++)
        if (cells.at(rows[i]) >= 0) next = static_cast<std::size_t>(slots[i] = take_slot(rows[i], next));
}

std::int32_t ExactRows::put(std::int64_t row) {
    forget(row, 1);
    const std::int32_t slot = take_slot(row, 0);
    clock_++;
    return slot;
}

std::int32_t ExactRows::find(std::int64_t row) const {
    const auto at = std::find(slots_.begin(), slots_.end(), row);
    return at == slots_.end() ? -1 : static_cast<std::int32_t>(at - slots_.begin());
}

std::vector<std::int32_t> ExactRows::find(std::int64_t first, std::int64_t n) const {
    std::vector<std::int32_t> found(n, -1);
    for (std::size_t s = 0; s < slots_.size(); s++)
        if (slots_[s] >= first && slots_[s] < first + n) found[slots_[s] - first] = static_cast<std::int32_t>(s);
    return found;
}

std::span<const SlotMove> ExactRows::trim(const CellPositions& cells) {
    thread_local Steps steps;
    moves_ = once(steps, cells, {}, [&](Step& s) { trim_now(cells, s.moves); }).moves;
    return moves_;
}

void ExactRows::trim_now(const CellPositions& cells, std::vector<SlotMove>& moves) {
    struct State {
        std::int32_t last = -1;
        std::uint64_t written = 0;
    };
    BySequence<State> sequences;
    for (std::size_t s = 0; s < slots_.size(); s++)
        if (slots_[s] >= 0) {
            State& q = sequences.at(sequence(slots_[s], cells), {});
            q.last = std::max(q.last, cells.at(slots_[s]));
            q.written = std::max(q.written, written_[s]);
        }
    std::vector<std::uint64_t> times;
    for (const auto& [key, q] : sequences.all) times.push_back(q.written);
    std::sort(times.rbegin(), times.rend());
    const auto most = static_cast<std::size_t>(std::max<std::int64_t>(kMaxSequences, n_streams_));
    const std::uint64_t oldest = times.size() > most ? times[most - 1] : 0;

    std::size_t live = 0;
    for (std::size_t s = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0) continue;
        const State& q = sequences.at(sequence(slots_[s], cells), {});
        const std::int32_t pos = cells.at(slots_[s]);
        // One more than the next query wants, which counts itself: the last token may be taken back and asked again (llama-server does so
        // with a restored slot).
        if (pos < 0 || q.written < oldest || (pos >= windows_.sink && pos <= q.last - windows_.recent))
            slots_[s] = -1;
        else
            live++;
    }
    // Close up, to take no more memory than the windows and the next token of every sequence, or what may be free: while tokens come one by
    // one, or drafts, the slots that some leave are the next ones', and nothing moves.
    moves.clear();
    if (slots_.size() <= live + std::max(sequences.all.size(), spare_)) return;
    for (std::size_t s = live, to = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0) continue;
        while (slots_[to] >= 0) to++;
        moves.push_back({static_cast<std::int32_t>(s), static_cast<std::int32_t>(to)});
        slots_[to] = slots_[s], written_[to] = written_[s];
    }
    resize(live);
}

void ExactRows::forget(std::int64_t first, std::int64_t n) {
    for (std::int64_t& row : slots_)
        if (row >= first && row < first + n) row = -1;
}

ExactRows::Arrangement ExactRows::arrange(std::span<const std::int64_t> slots) {
    Arrangement a;
    auto beyond = static_cast<std::int32_t>(std::max(slots_.size(), slots.size()));
    std::vector<std::int64_t> rows(slots.size(), -1);
    std::vector<std::uint64_t> written(slots.size());
    for (std::size_t s = 0; s < slots.size(); s++) {
        const std::int32_t at = slots[s] < 0 ? -1 : find(slots[s]);
        if (at < 0) continue;
        rows[s] = slots[s], written[s] = written_[at];
        if (at == static_cast<std::int32_t>(s)) continue;
        a.out.push_back({at, beyond}), a.in.push_back({beyond, static_cast<std::int32_t>(s)});
        beyond++;
    }
    slots_ = std::move(rows), written_ = std::move(written);
    n_slots_.store(slots_.size(), std::memory_order_relaxed);
    return a;
}

std::span<const SlotMove> ExactRows::copy_stream(std::int64_t src, std::int64_t dst) {
    moves_.clear();
    if (src == dst) return moves_;
    forget(dst * n_cells_, n_cells_);
    for (std::size_t s = 0, n = slots_.size(); s < n; s++) {
        if (slots_[s] < 0 || slots_[s] / n_cells_ != src) continue;
        const std::int32_t to = take_slot(slots_[s] + (dst - src) * n_cells_, n);
        written_[static_cast<std::size_t>(to)] = written_[s];
        moves_.push_back({static_cast<std::int32_t>(s), to});
    }
    return moves_;
}

}  // namespace turboquant
