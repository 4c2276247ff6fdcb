// The cache of one layer: its keys, its values, what it shares with the other layers (cells), what is removed from its keys (offset,
// scales), outlier channels and exact windows. The only place that knows in which order these are to be called.
//
// A batch goes write(keys), write(values), attend; the rows of a batch stay exact until attention over them is done. State may be saved and
// restored, streams copied and positions shifted between any two of these.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_rows.h"
#include "turboquant/cache/step_plan.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {

/// Who runs the operations of a cache's layers, and memory that they use one after the other, grown as needed. Not for two at a time.
struct CacheContext {
    StoreContext store;

    StepPlans plans;  ///< begin_graph() with every graph
};

/// What the streams of one attention call have of their own (attention.h, AttentionArgs).
struct StreamQuery {
    const float* q = nullptr;
    float* out = nullptr;
    const std::uint16_t* mask = nullptr;
    const std::uint16_t* host_mask =
        nullptr;                    ///< the same where the host reads it; null: `mask` is there, or nowhere (TileStore::has_masks)
    const void* mask_id = nullptr;  ///< tells masks of a graph apart that lie in the same memory, one after the other
};

class LayerCache {
  public:
    /// `cells` is shared by all layers of the cache and outlives them.
    explicit LayerCache(CellPositions& cells) : cells_(&cells) {}
    LayerCache(const LayerCache&) = delete;

    /// Adds the keys or the values, or replaces them before anything was written.
    void set_tensor(const KvGeometry& g, StoreFactory store);
    bool has(Side side) const { return tensors_[index(side)] != nullptr; }
    KvTensor& tensor(Side side) { return *tensors_[index(side)]; }
    const KvTensor& tensor(Side side) const { return *tensors_[index(side)]; }
    CellPositions& cells() const { return *cells_; }

    /// What is done to keys before they are quantized, where their format allows it.
    struct KeyTreatment {
        bool remove_offset = true;
        std::string_view scales;  ///< letters (spec/channel_scales.h), or empty
    };
    /// Fixes the head size of a side. Idempotent. Throws std::invalid_argument as KvTensor::bind_head_dim and KeyOffset::set_scales, and if
    /// scales are asked for where keys serve as values, too.
    void bind(Side side, int head_dim, const KeyTreatment& keys);
    /// The RoPE of the keys, or none. Once, before they are written; the first layer that has one sets the positions of the cells (the
    /// input may be gone when later layers run). Throws std::invalid_argument as KeyOffset::check_scales.
    void set_rope(const std::optional<RopeParams>& rope);
    bool rope_known() const { return rope_known_; }

    /// Writes keys, rows[i] = stream * n_cells + cell; `pos` are the positions of their tokens, empty if they are not known, `beside` as
    /// CellPositions::place takes it. Only one layer's count: see set_rope. False if a value is not finite; its vector is zero then, the
    /// others are written.
    bool write_keys(CacheContext& ctx, const StoreRows& batch, std::span<const std::int32_t> pos,
                    std::span<const std::uint8_t> beside = {});
    bool write_values(CacheContext& ctx, const StoreRows& batch);

    /// Attention of the queries streams[i] over stream first_stream + i. Of `a`, everything but q, out, mask, k, v and term is given;
    /// v_is_k says that the values are read out of the keys. Returns why it cannot be done, or null.
    const char* attend(CacheContext& ctx, AttentionArgs a, std::int64_t first_stream, std::span<const StreamQuery> streams);

    /// Ends a batch that nothing attends over (attend() ends its own): rows that no later query can want exactly go.
    void end_batch(StoreContext& ctx);

    /// Rows first..first+n-1 as fp16 in the model's space, exact where they are kept so: for operations that have no form for compressed
    /// rows. out[i*n_embd ..). Takes the place of attend(): of this side, rows that no later query can want exactly go.
    void decode(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, std::uint16_t* out);

    /// Hands out rows first..first+n-1 of a side, and takes them in (KvTensor): for packers. Rows that cannot be restored are lost, nothing
    /// else is: they read as zeros.
    void save_rows(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, RowWriter& out);
    RestoreResult restore_rows(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, RowReader& in);

    /// Bytes of llama.cpp's form of all rows (saved_rows.h), 2*n_embd a row: `size` of them from `offset` on.
    void save(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, void* out);
    /// The way back. Rows of which only a part comes keep the rest of their saved form.
    RestoreResult restore(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, const void* in);
    /// Why keys restored since the last call were found to be lost only when they were used, or ok.
    RestoreResult take_lost() { return std::exchange(lost_, RestoreResult::ok); }
    /// Moves the keys of row r by shift[r] positions (context shift).
    void shift(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift);
    /// Copies all cells of a stream; with the keys go the positions.
    void copy_stream(StoreContext& ctx, Side side, std::int64_t src, std::int64_t dst);
    /// Forgets everything: the tensors' memory was zeroed. The cells are cleared by their owner.
    void clear();

    /// Whether the offset is removed from the keys. Not where a layer without RoPE shares its cells with layers that have it: the
    /// positions, and with them the offsets of the sequences, are known only when the first of those runs.
    bool removes_offset() const;

  private:
    static int index(Side side) { return side == Side::key ? 0 : 1; }
    void finish_restore(StoreContext& ctx);
    void settle_windows(StoreContext& ctx, std::span<const std::int64_t> rows);
    void pair_exact(StoreContext& ctx);
    void save_as_llama(StoreContext& ctx, Side side, std::size_t first, std::size_t n, std::uint16_t* out);
    void set_score_term(const StepPlan& plan, QueryTransform& queries, AttentionArgs& a);

    CellPositions* cells_;
    std::vector<TileStore::StreamCall> calls_;  // of the attention at hand; members, to be used again
    std::vector<QueryTransform> queries_;
    std::unique_ptr<KvTensor> tensors_[2];
    CarriedOffsets carried_[2];           ///< by the rows of llama.cpp's states
    std::uint64_t shift_generation_ = 0;  ///< see CellPositions::shift
    bool rope_known_ = false;
    bool restored_ = false;  ///< since rows were written
    RestoreResult lost_ = RestoreResult::ok;
};

}  // namespace turboquant
