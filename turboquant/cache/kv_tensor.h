// One KV tensor (the keys or the values of one layer): what is decided about its rows. Its bytes are a TileStore's.
//
// The cache it belongs to sees rows: row = stream * n_cells + cell, each of n_embd values (all KV heads of one token). The head size is not
// known when memory is laid out: reserve the worst case, bind it later.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "turboquant/cache/exact_rows.h"
#include "turboquant/cache/first_rows.h"
#include "turboquant/cache/key_offset.h"
#include "turboquant/cache/outlier_channels.h"
#include "turboquant/cache/positions.h"
#include "turboquant/cache/snapshot.h"
#include "turboquant/cache/tile_store.h"
#include "turboquant/spec/head_codecs.h"

namespace turboquant {

/// Why rows of a saved state were lost: they are zero vectors then, as if they had not been written. `damaged`: the row is none that was
/// ever saved, or holds values that are not finite. `offset_missing`: keys saved with an offset removed that the rows at hand do not tell,
/// or into a cache with offset removal off. `scales_differ`: keys saved with channel scales that this cache does not have.
enum class RestoreResult { ok, damaged, offset_missing, scales_differ };
/// What to say of two parts of a state.
inline RestoreResult worse(RestoreResult a, RestoreResult b) { return std::max(a, b); }

class KvTensor {
  public:
    using Geometry = KvGeometry;

    KvTensor(const Geometry& g, StoreFactory store) : g_(g), make_store_(std::move(store)) {}

    const Geometry& geometry() const { return g_; }
    bool bound() const { return store_ != nullptr; }
    int head_dim() const { return bound() ? layout().head_dim() : 0; }
    int n_head() const { return layout().n_head(); }
    const Layout& layout() const { return store_->layout(); }
    TileStore& store() const { return *store_; }

    /// Fixes the head size. Idempotent. Throws std::invalid_argument as Layout, or if the size contradicts an earlier one.
    void bind_head_dim(int head_dim);

    /// Bytes of all cells in this format, codes and scales, of the exact windows, and of what is removed from keys: an offset in fp16 per
    /// stream and channel, and the channels' scales. 0 before the head size is bound.
    std::size_t format_bytes() const;
    /// Of these, what is kept elsewhere than in the tensor's memory: the keys' offset and scales.
    std::size_t offset_bytes() const;

    /// Writes a batch: encodes it, with offset removal or without, and keeps what may be wanted exactly. `cells` were placed before
    /// (CellPositions::place). Returns false if a value was not finite. Once attention over it is done, end_batch() follows.
    bool write(StoreContext& ctx, StoreRows batch, const CellPositions& cells, bool remove_offset);
    void end_batch(StoreContext& ctx, const CellPositions& cells);
    /// Drops what such a batch, which is placed, ends of its sequences' windows, and what none can want that comes after it.
    void make_way(StoreContext& ctx, std::span<const std::int64_t> rows, const CellPositions& cells);

    /// Encodes a batch of rows as they are. While outlier channels are measured (measuring), the measurement is brought up to date and what
    /// was written before is encoded again. Returns false if a value was not finite.
    bool encode_rows(StoreContext& ctx, StoreRows batch);
    bool measuring() const { return outliers_ && !outliers_->frozen(); }

    /// Encodes a batch of key rows with offset removal; `cells` says where they stand and which offset they have (CellPositions::place).
    /// Cells without a position are encoded as they are. While an offset is measured, rows that it was measured on are encoded again when
    /// it changes. False as encode_rows.
    bool encode_keys(StoreContext& ctx, StoreRows batch, const CellPositions& cells);

    /// What was measured so far stays; nothing if nothing was.
    void freeze();
    /// Forgets what was measured: the memory was zeroed.
    void reset();

    /// Offset removal of a key tensor, or null if it is off. Made by enable_offset (after bind_head_dim).
    KeyOffset* offset() const { return offset_.get(); }
    /// Outlier channels, or null if the format has none. Made when the head size is bound.
    const OutlierChannels* outliers() const { return outliers_.get(); }
    void enable_offset() {
        offset_ = std::make_unique<KeyOffset>(n_head(), head_dim());
        offset_->set_fetch([this](std::span<const std::int32_t> places, std::uint16_t* rows) { store_->fetch(places, rows); });
        offset_->set_fetch_mu([this](int id, std::uint16_t* mu) { store_->fetch_mean(id, mu); });
    }

    /// Exact rows lie as those of the other side do from now on; rows that are not exact there are so here no more. For stores that want
    /// pairs (TileStore::exact_in_pairs), after a restore: saved keys and values need not have been exact alike.
    void pair_exact(StoreContext& ctx, const ExactRows& other);
    /// Exact windows, or null if there are none. Made when the head size is bound.
    const ExactRows* exact() const { return exact_.get(); }
    /// The values of a row that is exact, as it is kept, or none. Needs windows.
    std::optional<std::vector<float>> exact_row(std::int64_t row, const CellPositions& cells) const;

    /// Decoded row in the model's space, offset included (n_embd values).
    void read_row(std::int64_t row, const CellPositions& cells, std::span<float> x) const;

    /// Decoded rows first..first+n-1 as fp16, out[i*n_embd ..), exact where they are kept so.
    void decode_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, const CellPositions& cells, std::uint16_t* out) const;

    /// Hands out rows first .. first+n-1. Restoring them gives the same bytes: saved state is lossless. Rows of one state are saved in
    /// ascending order.
    void save_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, const CellPositions& cells, RowWriter& out) const;
    /// Takes in rows first .. first+n-1. Also rows of other formats of ours and of llama.cpp's own f16 cache. Rows that are lost become
    /// zero, and the result says why; of some only finish_restore() knows. `places`: this tensor sets the positions and offset ids of the
    /// cells (the first key tensor with offset removal), the other key tensors of the cache follow it.
    RestoreResult restore_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, RowReader& in, CellPositions& cells, bool places);

    /// Must precede any use of restored rows: exact keys whose offset did not come with other rows are measured anew, as if just written;
    /// compressed ones are lost.
    RestoreResult finish_restore(StoreContext& ctx, CellPositions& cells);

    /// Moves the keys of row r by shift[r] positions (context shift). What was measured so far stays.
    void rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift);

    /// Copies all cells of a stream.
    void copy_stream(std::int64_t src, std::int64_t dst);

  private:
    /// What was measured of a batch of keys while it was written.
    struct Measured {
        int id;
        std::size_t first, n;  ///< rows to encode from what was kept; n 0: all that was, the offset has changed
    };
    void rotate_exact(const RopeParams& rope, std::span<const std::int32_t> shift);
    void rotate_residuals(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift);
    bool has_residuals() const { return exact_ && exact_->windows().residual(); }
    void read_window_row(std::int64_t row, std::int32_t slot, const CellPositions& cells, std::span<float> x) const;
    void observe(StoreContext& ctx, StoreRows& batch, const CellPositions& cells);
    bool encode_first_rows(StoreContext& ctx);
    void measure();
    bool measure_aside(StoreContext& ctx, int id, const CellPositions& cells);
    void put_places(std::size_t first);
    void remeasure_later(StoreContext& ctx, int id, const CellPositions& cells);
    bool encode_kept(StoreContext& ctx, int id, const CellPositions& cells, std::span<const std::int64_t> only);
    /// Rows to be encoded, those that are restored but cannot be copied.
    struct Decoded {
        std::vector<std::int64_t> rows;
        std::vector<std::int32_t> slots;  ///< of windows of residuals, or -1
        std::vector<float> x;

        /// The values of a row that is added.
        std::span<float> add_zeros(std::int64_t row, std::size_t n_embd, std::int32_t slot = -1) {
            rows.push_back(row), slots.push_back(slot);
            x.resize(x.size() + n_embd);
            return std::span(x).last(n_embd);
        }
    };
    /// Adds to a decoded row what was taken from it.
    void add_offset(std::int64_t row, const CellPositions& cells, std::span<float> x) const;
    RowForm form() const { return {g_.codecs, head_dim(), offset_ ? offset_->scale_hash() : 0}; }

    std::optional<RowSnapshot> kept_row(std::int64_t row, std::int32_t slot, const CellPositions& cells, bool takes_exact,
                                        std::vector<std::uint16_t>& values) const;
    void save_stored(StoreContext& ctx, std::int64_t first, std::int64_t n, std::int64_t i, std::span<const std::int32_t> slots,
                     const CellPositions& cells, RowWriter& out) const;

    /// The offset id that a hash was found to be.
    struct KnownOffset {
        std::uint32_t mu_hash = 0;
        int id = -1;
    };
    void begin_restore(std::int64_t first, std::int64_t n);
    std::vector<RowSnapshot> classify(std::int64_t n, RowReader& in);
    void place(std::int64_t row, const RowSnapshot& s, CellPositions& cells, KnownOffset& last);
    const std::vector<std::uint16_t>* known_mu(std::uint32_t hash) const;
    void adopt_offset(int id, const RowSnapshot& s);
    bool copies(const RowSnapshot& s, std::int64_t row, const CellPositions& cells);
    RestoreResult refusal(const RowSnapshot& s) const;
    RestoreResult restore_codes(StoreContext& ctx, std::int64_t row, const RowSnapshot& s, const CellPositions& cells, Decoded& decoded);
    RestoreResult restore_values(std::int64_t row, const RowSnapshot& s, const CellPositions& cells, Decoded& decoded);
    RestoreResult retry_waiting(StoreContext& ctx, const CellPositions& cells, bool last, Decoded& decoded);
    void put_residual(std::int64_t row, const RowSnapshot& s, const CellPositions& cells);
    std::int32_t put_exact(std::int64_t row, std::span<const float> x, const CellPositions& cells);
    void put_values(std::int64_t row, std::span<const float> x, const CellPositions& cells, Decoded& decoded);
    bool encode_decoded(StoreContext& ctx, const Decoded& decoded, const CellPositions& cells);
    void encode_pending(StoreContext& ctx, const CellPositions& cells, bool measure);
    void lose_offset(StoreContext& ctx, int id, CellPositions& cells);

    Geometry g_;
    StoreFactory make_store_;
    std::unique_ptr<TileStore> store_;
    FirstRows first_;
    std::unique_ptr<KeyOffset> offset_;
    std::unique_ptr<OutlierChannels> outliers_;
    std::unique_ptr<ExactRows> exact_;

    std::vector<Measured> measured_;  // of the batch at hand; members, to be used again
    std::vector<std::int32_t> batch_pos_, exact_slots_, places_, to_aside_, due_;
    std::vector<std::uint8_t> batch_beside_, rounded_, rounded_rows_;

    /// Codes that were restored, of which the offset is to come.
    struct Waiting {
        std::int64_t row;
        RowForm form;
        std::vector<std::uint8_t> codes, residual;
        RowSnapshot snapshot;  ///< but for what it refers to
    };
    /// Exact keys that were restored, but not compressed yet: their offset is to come.
    struct Pending {
        std::int64_t row;
        std::vector<float> x;
    };
    bool restoring_ = false;  ///< rows came since the last finish_restore()
    std::vector<Waiting> waiting_;
    std::vector<Pending> pending_;
    std::map<std::uint32_t, std::vector<std::uint16_t>> mus_;  ///< by hash, of the state that is being restored
};

}  // namespace turboquant
