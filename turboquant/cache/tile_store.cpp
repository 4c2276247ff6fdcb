#include "turboquant/cache/tile_store.h"

#include <algorithm>

#include "turboquant/codec/residual.h"
#include "turboquant/codec/rotation.h"

namespace turboquant {

StoreRows round_rows(Side side, std::size_t n_embd, StoreRows batch, std::vector<std::uint8_t>& memory) {
    if (std::ranges::find(batch.rounded, 1) == batch.rounded.end()) return batch;
    memory.resize(std::max(memory.size(), batch.rows.size() * n_embd * sizeof(float)));
    auto* out = reinterpret_cast<float*>(memory.data());
    for (std::size_t i = 0; i < batch.rows.size(); i++) {
        std::copy_n(batch.x + i * batch.stride, n_embd, out + i * n_embd);
        if (batch.rounded[i]) round_row(side, {out + i * n_embd, n_embd});
    }
    batch.x = out, batch.stride = n_embd, batch.rounded = {};
    return batch;
}

const char* TileStore::attend_streams(StoreContext& ctx, const TileStore& values, std::int64_t first_stream,
                                      std::span<const StreamCall> calls) const {
    for (const StreamCall& c : calls)
        if (const char* error = attend(ctx, values, first_stream++, c)) return error;
    return nullptr;
}

void TileStore::rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    const std::size_t d = layout_.head_dim();
    std::vector<float> table(rope.n_dims), x(layout_.n_embd());
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(shift.size()); row++) {
        if (shift[row] == 0) continue;
        rope_table(rope, static_cast<float>(shift[row]), table);
        read(ctx, row, 1, x.data());
        for (std::size_t at = 0; at < x.size(); at += d) rope_apply(rope, table, std::span(x).subspan(at, d));
        write(ctx, {x.data(), x.size(), {&row, 1}, {}, {}, true}, nullptr);
    }
}

std::uint16_t* TileStore::exact_row(std::int32_t slot) {
    const std::size_t n_embd = layout_.n_embd(), at = static_cast<std::size_t>(slot) * n_embd;
    if (exact_.size() < at + n_embd) exact_.resize(at + n_embd);
    return exact_.data() + at;
}

void TileStore::exact_out(std::int32_t slot, std::uint16_t* row) const {
    std::copy_n(exact_.begin() + static_cast<std::ptrdiff_t>(slot * layout_.n_embd()), layout_.n_embd(), row);
}

void TileStore::exact_in(std::int32_t slot, const std::uint16_t* row) { std::copy_n(row, layout_.n_embd(), exact_row(slot)); }

std::size_t TileStore::residual_at(std::size_t slot, int head, std::size_t n_places) const {
    return (static_cast<std::size_t>(head) * n_places + slot) * residual_bytes(layout_.head_dim());
}

void TileStore::place_residuals(std::size_t n_places) {
    const std::size_t row = residual_bytes(layout_.head_dim()), stay = std::min(n_places, n_places_) * row;
    std::vector<std::uint8_t> to(residual_at(0, layout_.n_head(), n_places));
    for (int h = 0; h < layout_.n_head() && stay; h++)
        std::copy_n(residuals_.data() + residual_at(0, h, n_places_), stay, to.data() + residual_at(0, h, n_places));
    residuals_ = std::move(to), n_places_ = n_places;
}

/// A few more than asked for: while a window fills, every token takes another slot.
void TileStore::hold_residuals(std::size_t n) {
    constexpr std::size_t kStep = 8;
    if (n > n_places_) place_residuals((n + kStep - 1) / kStep * kStep);
}

std::uint8_t* TileStore::residual(std::int32_t slot, int head) {
    hold_residuals(static_cast<std::size_t>(slot) + 1);
    return residuals_.data() + residual_at(slot, head, n_places_);
}

void TileStore::residual_out(std::int32_t slot, std::uint8_t* row) const {
    const std::size_t n = residual_bytes(layout_.head_dim());
    for (int h = 0; h < layout_.n_head(); h++) std::copy_n(residuals_.data() + residual_at(slot, h, n_places_), n, row + h * n);
}

void TileStore::residual_in(std::int32_t slot, std::span<const std::uint8_t> row) {
    const std::size_t n = residual_bytes(layout_.head_dim());
    for (int h = 0; h < layout_.n_head(); h++) std::copy_n(row.data() + h * n, n, residual(slot, h));
}

void TileStore::read_window(StoreContext& ctx, std::span<const std::int64_t> rows, std::span<const std::int32_t> slots, float* x) const {
    const std::size_t n_embd = layout_.n_embd(), d = layout_.head_dim();
    std::vector<float> left(d);
    for (std::size_t i = 0; i < rows.size(); i++) {
        read(ctx, rows[i], 1, x + i * n_embd);
        for (std::size_t at = 0; at < n_embd; at += d) {
            std::ranges::fill(left, 0.0f);
            residual_add(residuals_.data() + residual_at(slots[i], static_cast<int>(at / d), n_places_), left);
            rotation_for(layout_.head_dim()).inverse(left);
            for (std::size_t k = 0; k < d; k++) x[i * n_embd + at + k] += left[k];
        }
    }
}

void TileStore::move_exact(StoreContext&, std::span<const SlotMove> moves, std::size_t n_slots) {
    if (layout_.windows().residual()) {
        constexpr std::size_t kMostSpare = 16;
        hold_residuals(n_slots);
        for (const SlotMove& m : moves)
            for (int h = 0; h < layout_.n_head(); h++)
                std::copy_n(residual(m.from, h), residual_bytes(layout_.head_dim()), residual(m.to, h));
        if (n_places_ > n_slots + kMostSpare) place_residuals(n_slots);
        return;
    }
    const std::size_t size = n_slots * layout_.n_embd();
    if (exact_.size() < size) exact_.resize(size);
    for (const SlotMove& m : moves) std::copy_n(exact_row(m.from), layout_.n_embd(), exact_row(m.to));
    if (exact_.size() == size) return;
    exact_.resize(size);
    exact_.shrink_to_fit();
}

void TileStore::set_exact(const TileStore& values, ExactRowsView& e) const {
    if (!e.n) return;
    e.form = layout_.windows().form;
    if (e.form == WindowForm::residual) {
        const auto place = [](const TileStore& s, const std::uint8_t*& base, std::size_t& stride, std::size_t& head_stride) {
            base = s.residuals_.data(), stride = residual_bytes(s.layout_.head_dim()), head_stride = s.n_places_ * stride;
        };
        place(*this, e.k, e.k_stride, e.k_head_stride), place(values, e.v, e.v_stride, e.v_head_stride);
        return;
    }
    e.k = reinterpret_cast<const std::uint8_t*>(exact_.data()), e.k_stride = layout_.window_row_bytes();
    e.v = reinterpret_cast<const std::uint8_t*>(values.exact_.data()), e.v_stride = values.layout_.window_row_bytes();
}

}  // namespace turboquant
