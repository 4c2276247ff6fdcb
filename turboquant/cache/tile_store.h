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
#include "turboquant/cache/step_cells.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {

/// Who runs the verbs, and memory that they use one after the other, grown as needed. Not for two verbs at a time.
struct StoreContext {
    Executor* executor = nullptr;
    std::vector<std::uint8_t> workspace{};
    std::vector<float> scaled_q{}, q_terms{};
    std::shared_ptr<void> device{};  ///< what stores of another device than the CPU keep here: a stream, memory
};

/// x[i*stride ..+n_embd) is row rows[i], in the model's space.
struct StoreRows {
    const float* x = nullptr;
    std::size_t stride = 0;
    std::span<const std::int64_t> rows;
    std::span<const std::uint8_t> rounded;      ///< which rows are rounded first (round_row); empty: none
    std::span<const std::int32_t> exact_slots;  ///< slot that takes what is kept of a row in a window, or -1; empty: none
    bool on_host = false;                       ///< x is host memory, whatever the device takes
    std::span<const std::int32_t> aside{};      ///< instead of x: the places where the rows were set aside
    bool seen_exactly = false;                  ///< all queries of the batch see all rows as windows keep them
    /// Places where they are set aside besides (TileStore::set_aside), or empty; of at most rows_set_aside_by_write() rows.
    std::span<const std::int32_t> to_aside{};
};

/// What queries are for keys that were transformed: scaled the other way, and with the terms (ScoreTerm::q_term) of some offsets.
struct QueryTransform {
    KeyTransform keys;
    std::span<const int> ids;  ///< the terms, in the order of AttentionArgs::term; empty: none
};

/// The batch with the rows rounded that are to be, and nothing left to round; copies go to `memory`.
StoreRows round_rows(Side side, std::size_t n_embd, StoreRows batch, std::vector<std::uint8_t>& memory);

class TileStore {
  public:
    explicit TileStore(const Layout& layout) : layout_(layout) {}
    virtual ~TileStore() = default;
    TileStore(const TileStore&) = delete;

    const Layout& layout() const { return layout_; }

    /// Whether windows of residuals can be had; else only fp16 ones.
    virtual bool takes_residuals() const { return false; }

    /// Encodes rows, keys as `keys` says (null: as they are), and keeps of rows in windows exact copies, untransformed, or what the codes
    /// leave. False if a vector is not finite: it becomes zero, the others are written.
    virtual bool write(StoreContext& ctx, const StoreRows& rows, const KeyTransform* keys) = 0;

    /// Attention over a stream. q, out, mask and sinks are what the device takes. Of the streams of a batch sizes, strides and scalars are
    /// alike.
    struct StreamCall {
        AttentionArgs args;  ///< all but k and v, and those of the exact rows, is given; queries are as the model made them
        const QueryTransform* queries = nullptr;  ///< what becomes of them, or null: nothing
        /// What comes with the mask (patch, exact rows, cells of the term): in two calls of a context with the same number that is not 0 it
        /// is the same.
        std::uint64_t plan = 0;
        std::uint64_t cells = 0;  ///< as `plan`, for the cells of the term alone
        /// Of the exact rows, whose cells are args.exact.cells: for stores that find out themselves who wants which (has_masks).
        const std::int32_t* exact_positions = nullptr;
    };
    /// This store has the keys; `values` has the values and is of the same kind, or is this one (v_is_k). Returns why it cannot be done
    /// (check_attention_args), or null.
    virtual const char* attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const = 0;
    /// attend() for streams first_stream, first_stream + 1, ..: one after the other, where the device does not take them together.
    virtual const char* attend_streams(StoreContext& ctx, const TileStore& values, std::int64_t first_stream,
                                       std::span<const StreamCall> calls) const;
    /// Whether exact rows must lie in slots of one number in keys and values: others are attended to in compressed form.
    virtual bool exact_in_pairs() const { return false; }
    /// Slots of exact rows that may stay free among those in use: where moving rows costs more than memory for so many.
    virtual std::size_t spare_exact_slots() const { return 0; }
    /// Whether the store has the masks, which are where it computes, and finds out itself who wants which exact rows: calls have neither a
    /// patch nor masks of exact rows then. And which cells some query of a mask sees, of those that the host does not have: seen[j] != 0.
    virtual bool has_masks() const { return false; }
    virtual void see_cells(StoreContext&, const StepMask& /*mask*/, std::vector<std::uint16_t>& /*seen*/) const {}

    /// Whether the host may look at inputs of write(). If not, it has rows set aside that it may want to know later: x[i*stride ..) as fp16
    /// in the numbered place places[i] (-1: not this one), and fetches them, n_embd values each, when it does; that waits for the device.
    virtual bool inputs_on_host() const { return true; }
    virtual void set_aside(StoreContext&, const float* /*x*/, std::size_t /*stride*/, std::span<const std::int32_t> /*places*/) {}
    /// Batches of up to so many rows are better set aside by write() (StoreRows::to_aside), if that is soon enough.
    virtual std::size_t rows_set_aside_by_write() const { return 0; }
    /// f is done when what the device is doing now (a graph of many layers) needs nothing more from the host: what can wait for that is not
    /// in its way. At once where there is nothing.
    virtual void when_free(StoreContext&, std::function<void()> f) { f(); }
    virtual void fetch(std::span<const std::int32_t> /*places*/, std::uint16_t* /*rows*/) const {}
    /// The offset of an id becomes the mean, before RoPE, of rows that were set aside and stand at these positions (key_offset.h). The host
    /// does not wait for it; fetch_mean(), which gives it to the host ([n_head][head_dim]), does if need be.
    virtual void measure(StoreContext&, int /*id*/, std::span<const std::int32_t> /*places*/, std::span<const std::int32_t> /*positions*/,
                         const KeyTransform& /*keys*/) {}
    virtual void fetch_mean(int /*id*/, std::uint16_t* /*mu*/) const {}

    /// Decodes rows first..first+n-1 into x[i*n_embd ..), the model's space; keys without what was taken from them, and still scaled.
    virtual void read(StoreContext& ctx, std::int64_t first, std::int64_t n, float* x) const = 0;

    /// Rows first..first+n-1 in row form, layout().row_bytes() of them at out + i*stride, and back. Not for composites.
    virtual void rows_out(StoreContext& ctx, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const = 0;
    virtual void rows_in(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) = 0;

    /// Rotates every head of row r by shift[r] positions: decoded, rotated, encoded (context shift). What was taken from a key moves with
    /// its cell's position by itself. Here: by read() and write().
    virtual void rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift);

    /// Copies all cells of a stream.
    virtual void copy_stream(std::int64_t src, std::int64_t dst) = 0;
    /// Forgets all rows. Memory that a store was handed was zeroed by its owner before, who can do it for many tensors at once.
    virtual void clear() { exact_ = {}, residuals_ = {}, n_places_ = 0; }

    /// Exact rows of fp16 windows, in slots, in row form. Slots that are written to come into being.
    virtual void exact_out(std::int32_t slot, std::uint16_t* row) const;
    virtual void exact_in(std::int32_t slot, const std::uint16_t* row);
    /// Of windows of residuals: a slot's, layout().window_row_bytes() bytes, the heads one after the other.
    void residual_out(std::int32_t slot, std::uint8_t* row) const;
    void residual_in(std::int32_t slot, std::span<const std::uint8_t> row);
    /// As read(), of rows with their residuals: x[i*n_embd ..) is rows[i], which has slots[i].
    void read_window(StoreContext& ctx, std::span<const std::int64_t> rows, std::span<const std::int32_t> slots, float* x) const;
    /// Copies slots, one move after the other, and keeps n_slots of them.
    virtual void move_exact(StoreContext& ctx, std::span<const SlotMove> moves, std::size_t n_slots);

    /// Formats with outlier channels: from now on n a head, those that `masks` marks ([n_head][head_dim]). Tiles change with it: `written`
    /// lists all rows that were written so far, they become zero.
    virtual void set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) = 0;

  protected:
    // Exact rows in host memory, for the stores that have theirs there.
    std::uint16_t* exact_row(std::int32_t slot);
    /// Room for residuals in slots 0..n-1; those that are there stay.
    void hold_residuals(std::size_t n);
    std::uint8_t* residual(std::int32_t slot, int head);
    /// Sets k and v of an attention call's exact rows.
    void set_exact(const TileStore& values, ExactRowsView& e) const;

    Layout layout_;

  private:
    std::size_t residual_at(std::size_t slot, int head, std::size_t n_places) const;
    void place_residuals(std::size_t n_places);

    std::vector<std::uint16_t> exact_;  ///< fp16 windows: [slot][n_embd]
    /// Residuals: [head][n_places_][residual_bytes()]. A head's lie together, since attention takes one head after the other.
    std::vector<std::uint8_t> residuals_;
    std::size_t n_places_ = 0;
};

/// Makes the store of a tensor when its layout is known. Its memory is all zero then, and cells that were never written decode to zeros.
using StoreFactory = std::function<std::unique_ptr<TileStore>(const Layout&)>;

}  // namespace turboquant
