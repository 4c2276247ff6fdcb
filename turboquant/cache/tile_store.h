// The seam to a device: the bytes of one KV tensor, and no decisions.
//
// A store encodes, attends, hands rows out and takes them in. What is decided on the way (which cell has which position and offset, what mu
// is, which channels are outliers, which rows are exact) is decided on the host, once for all devices, and arrives as plain data: four
// bytes a cell, a table of mu by id, numbers of slots. What a tile looks like inside is the store's own business: the row form
// (codec/tile.h) is the contract between stores, for saved state and whatever else keeps rows.
//
// Pointers to inputs and outputs of write() and attend() are what the device takes: host memory on a CPU, its own on a GPU. All else is in
// host memory. Verbs take effect in the order in which they are called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/cache/key_transform.h"
#include "turboquant/cache/layout.h"
#include "turboquant/cache/rope.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {

/// Who runs the verbs, and host memory that they use one after the other, grown as needed. Not for two verbs at a time.
struct StoreContext {
    Executor* executor = nullptr;
    std::vector<std::uint8_t> workspace;
};

/// x[i*stride ..+n_embd) is row rows[i], in the model's space.
struct StoreRows {
    const float* x = nullptr;
    std::size_t stride = 0;
    std::span<const std::int64_t> rows;
};

class TileStore {
  public:
    explicit TileStore(const Layout& layout) : layout_(layout) {}
    virtual ~TileStore() = default;
    TileStore(const TileStore&) = delete;

    const Layout& layout() const { return layout_; }

    /// Encodes rows, keys as `keys` says (null: as they are). False if a vector is not finite: it becomes zero, the others are written.
    virtual bool write(StoreContext& ctx, const StoreRows& rows, const KeyTransform* keys) = 0;

    /// Attention over a stream; of `a` all but k and v is given. This store has the keys; `values` has the values and is of the same kind,
    /// or is this one (a.v_is_k). Returns why it cannot be done (check_attention_args), or null.
    virtual const char* attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, AttentionArgs a) const = 0;

    /// Decodes rows first..first+n-1 into x[i*n_embd ..), the model's space; keys without what was taken from them, and still scaled.
    virtual void read(std::int64_t first, std::int64_t n, float* x) const = 0;

    /// Rows first..first+n-1 in row form, out[i*layout().row_bytes() ..), and back. Not for composites.
    virtual void rows_out(std::int64_t first, std::int64_t n, std::uint8_t* out) const = 0;
    virtual void rows_in(std::int64_t first, std::int64_t n, const std::uint8_t* in) = 0;

    /// Rotates every head of row r by shift[r] positions: decoded, rotated, encoded (context shift). What was taken from a key moves with
    /// its cell's position by itself.
    virtual void rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) = 0;

    /// Copies all cells of a stream.
    virtual void copy_stream(std::int64_t src, std::int64_t dst) = 0;
    /// Forgets all rows. Memory that a store was handed was zeroed by its owner before, who can do it for many tensors at once.
    virtual void clear() = 0;

    /// Formats with outlier channels: from now on n a head, those that `masks` marks ([n_head][head_dim]). Tiles change with it: `written`
    /// lists all rows that were written so far, they become zero.
    virtual void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) = 0;

  protected:
    Layout layout_;
};

/// Makes the store of a tensor when its layout is known. Its memory is all zero then, and cells that were never written decode to zeros.
using StoreFactory = std::function<std::unique_ptr<TileStore>(const Layout&)>;

}  // namespace turboquant
