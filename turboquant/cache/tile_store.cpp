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
        if (const char* error = attend(ctx, values, first_stream++, c.args, c.queries, c.plan)) return error;
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
    const std::size_t at = static_cast<std::size_t>(slot) * slot_words();
    if (exact_.size() < at + slot_words()) exact_.resize(at + slot_words());
    return exact_.data() + at;
}

void TileStore::exact_out(std::int32_t slot, std::uint16_t* row) const {
    std::copy_n(exact_.begin() + static_cast<std::ptrdiff_t>(slot * layout_.n_embd()), layout_.n_embd(), row);
}

void TileStore::exact_in(std::int32_t slot, const std::uint16_t* row) { std::copy_n(row, layout_.n_embd(), exact_row(slot)); }

std::span<const std::uint8_t> TileStore::residual(std::int32_t slot) const {
    return {reinterpret_cast<const std::uint8_t*>(exact_.data() + slot * slot_words()), layout_.window_row_bytes()};
}

void TileStore::set_residual(std::int32_t slot, std::span<const std::uint8_t> row) { std::ranges::copy(row, residual_row(slot)); }

void TileStore::read_window(StoreContext& ctx, std::span<const std::int64_t> rows, std::span<const std::int32_t> slots, float* x) const {
    const std::size_t n_embd = layout_.n_embd(), d = layout_.head_dim();
    std::vector<float> left(d);
    for (std::size_t i = 0; i < rows.size(); i++) {
        read(ctx, rows[i], 1, x + i * n_embd);
        const std::uint8_t* row = residual(slots[i]).data();
        for (std::size_t at = 0; at < n_embd; at += d, row += residual_bytes(layout_.head_dim())) {
            std::ranges::fill(left, 0.0f);
            residual_add(row, left);
            rotation_for(layout_.head_dim()).inverse(left);
            for (std::size_t k = 0; k < d; k++) x[i * n_embd + at + k] += left[k];
        }
    }
}

void TileStore::move_exact(StoreContext&, std::span<const SlotMove> moves, std::size_t n_slots) {
    const std::size_t size = n_slots * slot_words();
    if (exact_.size() < size) exact_.resize(size);
    for (const SlotMove& m : moves) std::copy_n(exact_row(m.from), slot_words(), exact_row(m.to));
    if (exact_.size() == size) return;
    exact_.resize(size);
    exact_.shrink_to_fit();
}

void TileStore::set_exact(const TileStore& values, ExactRowsView& e) const {
    if (!e.n) return;
    e.form = layout_.windows().form;
    e.k = reinterpret_cast<const std::uint8_t*>(exact_.data()), e.k_stride = layout_.window_row_bytes();
    e.v = reinterpret_cast<const std::uint8_t*>(values.exact_.data()), e.v_stride = values.layout_.window_row_bytes();
}

}  // namespace turboquant
