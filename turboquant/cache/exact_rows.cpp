#include "turboquant/cache/exact_rows.h"

#include <algorithm>
#include <bit>
#include <map>

#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/tile.h"
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

ExactRows::ExactRows(WindowSizes windows, Side side, int n_head, int head_dim, std::int64_t n_cells, std::int64_t n_streams)
    : windows_(windows), shape_{CodecId::raw, side, head_dim}, n_head_(n_head), n_cells_(n_cells), n_streams_(n_streams) {}

TileView ExactRows::view() const {
    const std::size_t bytes = tile_bytes(shape_);
    return {shape_, tiles_.data(), bytes, n_head_ * bytes};
}

std::size_t ExactRows::full_bytes() const {
    return static_cast<std::size_t>(windows_.bits(n_cells_, static_cast<std::int64_t>(n_embd()))) / 8 * n_streams_;
}

void ExactRows::resize(std::size_t n_slots) {
    slots_.resize(n_slots, -1);
    written_.resize(n_slots);
    tiles_.resize((n_slots + kTileKeys - 1) / kTileKeys * n_head_ * tile_bytes(shape_));
}

std::vector<float> ExactRows::read(std::size_t slot) const {
    std::vector<float> x(n_embd());
    const std::uint8_t* tile = tiles_.data() + slot / kTileKeys * n_head_ * tile_bytes(shape_);
    for (int h = 0; h < n_head_; h++)
        tile_decode_rotated(shape_, tile + h * tile_bytes(shape_), static_cast<int>(slot % kTileKeys),
                            std::span(x).subspan(static_cast<std::size_t>(h) * shape_.head_dim, shape_.head_dim));
    return x;
}

void ExactRows::write(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> slots) {
    EncodeArgs a;
    a.shape = shape_;
    a.tile_stride = n_head_ * tile_bytes(shape_);
    a.x_stride = stride;
    a.cells = slots.data();
    a.n = static_cast<int>(slots.size());
    for (int h = 0; h < n_head_; h++) {
        a.tiles = tiles_.data() + h * tile_bytes(shape_);
        a.x = x + static_cast<std::size_t>(h) * shape_.head_dim;
        encode(k, a);
    }
}

void ExactRows::add(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells) {
    // Position of the batch's first token of each sequence: a copy of a stream keeps its offset ids.
    std::map<std::pair<std::int64_t, int>, std::int32_t> first;
    const auto of = [&](std::int64_t row) { return std::pair(row / n_cells_, cells.offset_id(row)); };
    for (const std::int64_t row : rows)
        if (cells.at(row) >= 0) {
            const auto [at, is_new] = first.try_emplace(of(row), cells.at(row));
            if (!is_new) at->second = std::min(at->second, cells.at(row));
        }
    std::map<std::int64_t, std::size_t> slot_of;
    for (std::size_t s = 0; s < slots_.size(); s++)
        if (slots_[s] >= 0) slot_of[slots_[s]] = s;
    // The batch's own rows have their new positions, so they go, too, and are written again.
    for (const auto& [row, s] : slot_of) {
        const auto at = cells.at(row) >= 0 ? first.find(of(row)) : first.end();
        if (cells.at(row) < 0 || (at != first.end() && cells.at(row) >= at->second)) slots_[s] = -1;
    }
    std::vector<std::int64_t> to;
    std::size_t next = 0;
    clock_++;
    for (const std::int64_t row : rows) {
        while (next < slots_.size() && slots_[next] >= 0) next++;
        if (next == slots_.size()) resize(next + 1);
        // A row of unknown position takes no part, but a slot until the trim: the kernels encode whole batches.
        slots_[next] = cells.at(row) >= 0 ? row : -1;
        written_[next] = clock_;
        to.push_back(static_cast<std::int64_t>(next++));
    }
    write(k, x, stride, to);
}

void ExactRows::put(const Kernels& k, const float* x, std::int64_t row) {
    forget(row, 1);
    auto slot = std::find(slots_.begin(), slots_.end(), -1) - slots_.begin();
    if (static_cast<std::size_t>(slot) == slots_.size()) resize(slots_.size() + 1);
    slots_[slot] = row;
    written_[slot] = ++clock_;
    write(k, x, n_embd(), std::span<const std::int64_t>(&slot, 1));
}

std::optional<std::vector<float>> ExactRows::find(std::int64_t row) const {
    const auto at = std::find(slots_.begin(), slots_.end(), row);
    return at != slots_.end() ? std::optional(read(static_cast<std::size_t>(at - slots_.begin()))) : std::nullopt;
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
    // Close up when more than half is free.
    if (slots_.size() <= 2 * live + kTileKeys) return;
    std::size_t to = 0;
    const std::size_t bytes = row_bytes(CodecId::raw, shape_.head_dim), tile = tile_bytes(shape_);
    std::vector<std::uint8_t> row(bytes);
    for (std::size_t s = live; s < slots_.size(); s++) {
        if (slots_[s] < 0) continue;
        while (slots_[to] >= 0) to++;
        for (int h = 0; h < n_head_; h++) {
            tile_get_row(shape_, tiles_.data() + (s / kTileKeys * n_head_ + h) * tile, static_cast<int>(s % kTileKeys), row.data());
            tile_set_row(shape_, tiles_.data() + (to / kTileKeys * n_head_ + h) * tile, static_cast<int>(to % kTileKeys), row.data());
        }
        slots_[to] = slots_[s], written_[to] = written_[s];
        slots_[s] = -1;
    }
    resize(live);
    tiles_.shrink_to_fit();
}

void ExactRows::forget(std::int64_t first, std::int64_t n) {
    for (std::int64_t& row : slots_)
        if (row >= first && row < first + n) row = -1;
}

void ExactRows::clear() {
    resize(0);
    tiles_.shrink_to_fit();
}

void ExactRows::copy_stream(std::int64_t src, std::int64_t dst, const Kernels& k) {
    if (src == dst) return;
    forget(dst * n_cells_, n_cells_);
    for (std::size_t s = 0, n = slots_.size(); s < n; s++) {
        if (slots_[s] < 0 || slots_[s] / n_cells_ != src) continue;
        const std::vector<float> x = read(s);
        const auto to = static_cast<std::int64_t>(slots_.size());
        resize(slots_.size() + 1);
        slots_.back() = slots_[s] + (dst - src) * n_cells_;
        written_.back() = written_[s];
        write(k, x.data(), n_embd(), std::span(&to, 1));
    }
}

void ExactRows::rotate(const Kernels& k, const RopeParams& rope, std::span<const std::int32_t> shift) {
    std::vector<float> table(rope.n_dims);
    for (std::size_t s = 0; s < slots_.size(); s++) {
        if (slots_[s] < 0 || static_cast<std::size_t>(slots_[s]) >= shift.size() || shift[slots_[s]] == 0) continue;
        rope_table(rope, static_cast<float>(shift[slots_[s]]), table);
        std::vector<float> x = read(s);
        for (int h = 0; h < n_head_; h++)
            rope_apply(rope, table, std::span(x).subspan(static_cast<std::size_t>(h) * shape_.head_dim, shape_.head_dim));
        const auto slot = static_cast<std::int64_t>(s);
        write(k, x.data(), n_embd(), std::span(&slot, 1));
    }
}

void ExactRows::align(const Kernels& k, ExactRows& other) {
    if (slots_ == other.slots_) return;
    for (ExactRows* rows : {this, &other}) {
        const ExactRows& peer = rows == this ? other : *this;
        std::vector<std::int64_t> both;
        for (const std::int64_t row : rows->slots_)
            if (row >= 0 && std::find(peer.slots_.begin(), peer.slots_.end(), row) != peer.slots_.end()) both.push_back(row);
        std::sort(both.begin(), both.end());
        rows->keep_only(k, both);
    }
}

void ExactRows::keep_only(const Kernels& k, std::span<const std::int64_t> rows) {
    std::vector<float> x;
    std::vector<std::uint64_t> written;
    std::vector<std::int64_t> to;
    for (const std::int64_t row : rows) {
        const auto s = static_cast<std::size_t>(std::find(slots_.begin(), slots_.end(), row) - slots_.begin());
        const std::vector<float> one = read(s);
        x.insert(x.end(), one.begin(), one.end());
        written.push_back(written_[s]);
        to.push_back(static_cast<std::int64_t>(to.size()));
    }
    resize(rows.size());
    slots_.assign(rows.begin(), rows.end());
    written_ = std::move(written);
    write(k, x.data(), n_embd(), to);
}

}  // namespace turboquant
