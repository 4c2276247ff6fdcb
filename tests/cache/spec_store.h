// A second store, for the tests: tiles in a vector, every verb by the scalar specification. Slow, and as simple as the seam allows.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "turboquant/cache/queries.h"
#include "turboquant/cache/tile_store.h"
#include "turboquant/codec/composite.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant::test {

class SpecStore final : public TileStore {
  public:
    explicit SpecStore(const Layout& layout) : TileStore(layout), n_head_(layout.n_head()), d_(layout.head_dim()), tiles_(layout.bytes()) {}

    bool write(StoreContext& ctx, const StoreRows& batch, const KeyTransform* keys) override {
        const StoreRows in = round_rows(layout_.side(), layout_.n_embd(), batch, ctx.workspace);
        bool finite = true;
        for (std::size_t i = 0; i < in.rows.size(); i++) {
            const float* row = in.x + i * in.stride;
            for (int h = 0; h < n_head_; h++) {
                std::vector<float> x(row + h * d_, row + (h + 1) * d_), turn(2 * d_), code(d_);
                for (int k = 0; keys && keys->scales && k < d_; k++) x[k] *= keys->scales[h * d_ + k];
                if (const std::int32_t cell = keys ? keys->cells[in.rows[i]] : -1; cell >= 0) {
                    spread_turn(keys->rope, d_, CellPositions::position_of(cell), turn.data());
                    for (int k = 0; k < d_; k++) x[k] -= turned(keys->mu[CellPositions::id_of(cell)] + 2 * h * d_, turn.data(), d_, k);
                }
                if (!std::ranges::all_of(x, [](float f) { return std::isfinite(f); })) finite = false, std::ranges::fill(x, 0.0f);
                if (!masks_.empty()) composite_set_mask(layout_.shape(), tile(in.rows[i], h), std::span(masks_).subspan(h * d_, d_));
                tile_encode(layout_.shape(h), tile(in.rows[i], h), slot(in.rows[i]), x, layout_.norm_mode());
                if (in.exact_slots.empty() || in.exact_slots[i] < 0 || !layout_.windows().residual()) continue;
                rotation_for(d_).forward(x);
                tile_decode_rotated(layout_.shape(h), tile(in.rows[i], h), slot(in.rows[i]), code);
                for (int k = 0; k < d_; k++) x[k] -= code[k];
                residual_encode(x, residual(in.exact_slots[i], h));
            }
            if (!in.exact_slots.empty() && in.exact_slots[i] >= 0 && !layout_.windows().residual())
                std::transform(row, row + layout_.n_embd(), exact_row(in.exact_slots[i]), to_half);
        }
        return finite;
    }
    bool takes_residuals() const override { return true; }
    const char* attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const override {
        AttentionArgs a = call.args;
        if (call.queries) transform_queries(ctx, d_, *call.queries, a);
        a.k = view(stream), a.v = static_cast<const SpecStore&>(values).view(stream);
        set_exact(values, a.exact);
        if (const char* error = check_attention_args(a)) return error;
        reference_attention(a);
        return nullptr;
    }
    void read(StoreContext&, std::int64_t first, std::int64_t n, float* x) const override {
        for (std::int64_t i = 0; i < n * n_head_; i++, x += d_) {
            const std::int64_t row = first + i / n_head_;
            const TileShape shape = layout_.shape(i % n_head_);
            tile_decode_rotated(shape, tile(row, i % n_head_), slot(row), {x, static_cast<std::size_t>(d_)});
            if (codec_info(shape.codec).rotated) rotation_for(d_).inverse({x, static_cast<std::size_t>(d_)});
        }
    }
    void rows_out(StoreContext&, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const override {
        for (std::int64_t row = first; row < first + n; row++, out += stride)
            for (std::size_t h = 0, at = 0; h < static_cast<std::size_t>(n_head_); at += row_bytes(layout_.shape(h).codec, d_), h++)
                tile_get_row(layout_.shape(h), tile(row, h), slot(row), out + at);
    }
    void rows_in(StoreContext&, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) override {
        for (std::int64_t row = first; row < first + n; row++, in += stride)
            for (std::size_t h = 0, at = 0; h < static_cast<std::size_t>(n_head_); at += row_bytes(layout_.shape(h).codec, d_), h++)
                tile_set_row(layout_.shape(h), tile(row, h), slot(row), in + at);
    }
    void copy_stream(std::int64_t src, std::int64_t dst) override {
        const auto n = static_cast<std::int64_t>(layout_.stream_bytes());
        std::copy_n(tiles_.begin() + src * n, n, tiles_.begin() + dst * n);
    }
    void clear() override { TileStore::clear(), std::ranges::fill(tiles_, std::uint8_t{0}); }
    void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t>) override {
        if (layout_.set_n_outliers(n); !std::ranges::equal(masks, masks_)) tiles_.assign(layout_.bytes(), 0);
        masks_.assign(masks.begin(), masks.end());
    }

  private:
    std::uint8_t* tile(std::int64_t row, int h) const {
        return const_cast<std::uint8_t*>(tiles_.data()) + layout_.place(row) / kTileKeys * layout_.tile_stride() + layout_.head_at(h);
    }
    int slot(std::int64_t row) const { return static_cast<int>(layout_.place(row) % kTileKeys); }
    TileView view(std::int64_t stream) const {
        return {layout_.shape(), tiles_.data() + stream * layout_.stream_bytes(), tile_bytes(layout_.shape()), layout_.tile_stride(),
                layout_.heads().empty() ? nullptr : layout_.heads().data()};
    }

    int n_head_, d_;
    std::vector<std::uint8_t> tiles_, masks_;
};

}  // namespace turboquant::test
