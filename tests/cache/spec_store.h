// A second store, for the tests: every vector in a tile of its own, by the scalar specification. Slow, and as simple as the seam allows.
#pragma once

#include <map>
#include <stdexcept>
#include <vector>

#include "turboquant/cache/tile_store.h"
#include "turboquant/codec/composite.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant::test {

class SpecStore final : public TileStore {
  public:
    explicit SpecStore(const Layout& layout) : TileStore(layout), n_head_(layout.n_head()), d_(layout.head_dim()) {}

    bool write(StoreContext&, const StoreRows& in, const KeyTransform* keys) override {
        bool finite = true;
        for (std::size_t i = 0; i < in.rows.size(); i++)
            for (int h = 0; h < n_head_; h++) {
                std::vector<float> x(in.x + i * in.stride + h * d_, in.x + i * in.stride + (h + 1) * d_), turn(2 * d_);
                for (int k = 0; keys && keys->scales && k < d_; k++) x[k] *= keys->scales[h * d_ + k];
                if (const std::int32_t cell = keys ? keys->cells[in.rows[i]] : -1; cell >= 0) {
                    spread_turn(keys->rope, d_, CellPositions::position_of(cell), turn.data());
                    for (int k = 0; k < d_; k++) x[k] -= turned(keys->mu[CellPositions::id_of(cell)] + 2 * h * d_, turn.data(), d_, k);
                }
                finite = put(in.rows[i], h, x) && finite;
            }
        return finite;
    }
    const char* attend(StoreContext&, const TileStore& values, std::int64_t stream, AttentionArgs a) const override {
        std::vector<std::uint8_t> k, v;
        a.k = gather(stream, a.n_kv, k);
        a.v = a.v_is_k ? a.k : static_cast<const SpecStore&>(values).gather(stream, a.n_kv, v);
        if (const char* error = check_attention_args(a)) return error;
        reference_attention(a);
        return nullptr;
    }
    void read(std::int64_t first, std::int64_t n, float* x) const override {
        for (std::int64_t i = 0; i < n * n_head_; i++, x += d_) {
            const int h = static_cast<int>(i % n_head_);
            const std::span<float> out(x, d_);
            tile_decode_rotated(layout_.shape(h), tile(first + i / n_head_, h).data(), 0, out);
            if (codec_info(layout_.shape(h).codec).rotated) rotation_for(d_).inverse(out);
        }
    }
    void rows_out(std::int64_t first, std::int64_t n, std::uint8_t* out) const override {
        for (std::int64_t i = 0; i < n * n_head_; out += head_bytes(i), i++)
            tile_get_row(layout_.shape(i % n_head_), tile(first + i / n_head_, i % n_head_).data(), 0, out);
    }
    void rows_in(std::int64_t first, std::int64_t n, const std::uint8_t* in) override {
        for (std::int64_t i = 0; i < n * n_head_; in += head_bytes(i), i++) {
            auto& to = tiles_[{first + i / n_head_, i % n_head_}] = tile(first + i / n_head_, i % n_head_);
            tile_set_row(layout_.shape(i % n_head_), to.data(), 0, in);
        }
    }
    void rotate(StoreContext&, const RopeParams& rope, std::span<const std::int32_t> shift) override {
        std::vector<float> table(rope.n_dims), x(layout_.n_embd());
        for (std::size_t row = 0; row < shift.size(); row++) {
            if (shift[row] == 0) continue;
            rope_table(rope, static_cast<float>(shift[row]), table);
            read(row, 1, x.data());
            for (int h = 0; h < n_head_; h++) rope_apply(rope, table, head(x, h)), put(row, h, head(x, h));
        }
    }
    void copy_stream(std::int64_t src, std::int64_t dst) override {
        for (std::int64_t i = 0, n = layout_.n_cells(); i < n * n_head_; i++)
            tiles_[{dst * n + i / n_head_, i % n_head_}] = tile(src * n + i / n_head_, i % n_head_);
    }
    void clear() override { tiles_.clear(); }
    void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) override {
        for (const std::int64_t row : written)
            for (int h = 0; h < n_head_; h++) tiles_.erase({row, h});
        layout_.set_n_outliers(n);
        masks_.assign(masks.begin(), masks.end());
    }

  private:
    using Tile = std::vector<std::uint8_t>;
    Tile tile(std::int64_t row, int h) const {
        const auto at = tiles_.find({row, h});
        return at != tiles_.end() ? at->second : Tile(tile_bytes(layout_.shape(h)));
    }
    std::span<float> head(std::vector<float>& x, int h) const { return std::span(x).subspan(h * d_, d_); }
    std::size_t head_bytes(std::int64_t i) const { return row_bytes(layout_.shape(i % n_head_).codec, d_); }
    bool put(std::int64_t row, int h, std::span<const float> x) try {
        Tile& to = tiles_[{row, h}] = Tile(tile_bytes(layout_.shape(h)));
        if (!masks_.empty()) composite_set_mask(layout_.shape(), to.data(), std::span(masks_).subspan(h * d_, d_));
        tile_encode(layout_.shape(h), to.data(), 0, x, layout_.norm_mode());
        return true;
    } catch (const std::domain_error&) {
        return false;
    }
    /// Cells 0..n-1 of a stream as [tile][head].
    TileView gather(std::int64_t stream, int n, Tile& tiles) const {
        Tile row(layout_.row_bytes());
        tiles.assign(layout_.stream_bytes(), 0);
        for (std::int64_t i = 0, at = 0; i < n * n_head_; at += head_bytes(i), i++) {
            const std::int64_t cell = i / n_head_;
            const int h = i % n_head_;
            if (h == 0) rows_out(stream * layout_.n_cells() + cell, 1, row.data()), at = 0;
            std::uint8_t* to = tiles.data() + cell / kTileKeys * layout_.tile_stride() + layout_.head_at(h);
            tile_set_row(layout_.shape(h), to, cell % kTileKeys, row.data() + at);
        }
        const auto heads = layout_.heads();
        return {layout_.shape(), tiles.data(), tile_bytes(layout_.shape()), layout_.tile_stride(), heads.empty() ? nullptr : heads.data()};
    }

    int n_head_, d_;
    std::map<std::pair<std::int64_t, int>, Tile> tiles_;  // by row and head
    Tile masks_;
};

}  // namespace turboquant::test
