// One KV tensor (the keys or the values of one layer) in compressed form: geometry over memory that somebody else owns.
//
// The cache it belongs to sees rows: row = stream * n_cells + cell, each of n_embd values (all KV heads of one token). In memory the order
// is [stream][tile][head], tiles of 64 cells (codec/tile.h), so a growing prefix touches memory front to back. The head size is not known
// when memory is laid out: reserve the worst case, bind it later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/cache/exact_rows.h"
#include "turboquant/cache/first_rows.h"
#include "turboquant/cache/key_offset.h"
#include "turboquant/cache/outlier_channels.h"
#include "turboquant/cache/positions.h"
#include "turboquant/cache/rope.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/head_codecs.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant {

/// What was measured of a batch of keys while it was written. Reused: nothing is allocated once it has grown.
struct KeyBatch {
    struct Measured {
        int id;
        std::size_t first, n;  ///< rows to encode from what was kept; n 0: all that was, the offset has changed
    };
    std::vector<Measured> measured;
    std::vector<std::int32_t> pos;
};

/// `offset_missing`: keys saved with an offset removed that the rows at hand do not tell (too few of them), or into a cache with offset
/// removal off. `scales_differ`: keys saved with channel scales that this cache does not have.
enum class RestoreResult { ok, not_finite, offset_missing, scales_differ };

class KvTensor {
  public:
    struct Geometry {
        Side side = Side::key;
        HeadCodecs codecs = CodecId::turbo4;
        NormMode norm_mode = NormMode::corrected;
        std::int64_t n_embd = 0;   ///< values per row: head_dim * n_head_kv
        std::int64_t n_cells = 0;  ///< rows per stream
        std::int64_t n_streams = 1;
        float outlier_ratio = kOutlierRatio;  ///< see OutlierChannels
        WindowSizes windows{0, 0};
    };

    /// Bytes to reserve: the largest need over all head sizes and numbers of outlier channels, that divide n_embd, and what the exact
    /// windows take (elsewhere: this is the size that llama.cpp tells its user); rows of fp16 if none does (such a tensor can be allocated,
    /// and is refused at bind_head_dim).
    static std::size_t reserved_bytes(const Geometry& g);

    /// `memory`: reserved_bytes(g) bytes, all zero, 64-byte aligned, outliving this object.
    KvTensor(const Geometry& g, std::uint8_t* memory) : g_(g), memory_(memory) {}

    const Geometry& geometry() const { return g_; }
    std::uint8_t* memory() const { return memory_; }
    bool bound() const { return head_dim_ != 0; }
    int head_dim() const { return head_dim_; }
    int n_head() const { return static_cast<int>(g_.n_embd / head_dim_); }

    /// Fixes the head size. Idempotent. Throws std::invalid_argument if the size is unsupported, does not divide n_embd, contradicts an
    /// earlier one, or if the heads are not as many as the formats named.
    void bind_head_dim(int head_dim);

    /// Bytes of all cells in this format, codes and scales, of the exact windows, and of what is removed from keys: an offset in fp16 per
    /// stream and channel, and the channels' scales. 0 before the head size is bound.
    std::size_t format_bytes() const;
    /// Of these, what is kept elsewhere than in the tensor's memory: the keys' offset and scales.
    std::size_t offset_bytes() const;

    /// Of one head; all are alike unless the formats are mixed.
    TileShape shape(int head = 0) const { return {g_.codecs.of(head), g_.side, head_dim_, outliers_ ? outliers_->count() : 0}; }
    /// All heads of one stream, for the kernels. Valid as long as this object.
    TileView view(std::int64_t stream) const;

    /// Encodes head `head` of n rows: x[i*x_stride ..+head_dim) goes to row rows[i]. Returns false if a value was not finite.
    /// Different heads may be encoded concurrently. `scratch` holds n entries.
    bool encode(const Kernels& k, int head, const float* x, std::size_t x_stride, std::span<const std::int64_t> rows,
                std::span<std::int64_t> scratch);

    /// Encodes a batch of rows while outlier channels are measured on the first of them: while measuring(), the measurement is brought up
    /// to date and what was written before is encoded again. Must be used instead of encode() while measuring. x[i*stride ..+n_embd). False
    /// as encode.
    bool encode_rows(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> rows);
    bool measuring() const { return outliers_ && !outliers_->frozen(); }

    /// Encodes a batch of key rows with offset removal; `cells` says where they stand and which offset they have (CellPositions::place).
    /// Cells without a position are encoded as they are. False as encode.
    bool encode_keys(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells);

    /// The same in steps, for several threads: begin_keys; then encode_part for all parts, which may run at the same time; then end_keys.
    /// x, rows and cells are the same throughout. Part `ith` of `parts` is every parts-th head; `scratch` (its own) holds rows.size()
    /// entries.
    void begin_keys(const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells, KeyBatch& batch);
    bool encode_part(const Kernels& k, int ith, int parts, const float* x, std::size_t stride, std::span<const std::int64_t> rows,
                     const CellPositions& cells, std::span<std::int64_t> scratch);
    bool end_keys(const Kernels& k, std::span<const std::int64_t> rows, const CellPositions& cells, const KeyBatch& batch);

    /// What was measured so far stays; nothing if nothing was.
    void freeze();
    /// Forgets what was measured: the memory was zeroed.
    void reset();

    /// Offset removal of a key tensor, or null if it is off. Made by enable_offset (after bind_head_dim).
    KeyOffset* offset() const { return offset_.get(); }
    /// Outlier channels, or null if the format has none. Made when the head size is bound.
    const OutlierChannels* outliers() const { return outliers_.get(); }
    void enable_offset() { offset_ = std::make_unique<KeyOffset>(n_head(), head_dim()); }

    /// Exact windows, or null if there are none. Made when the head size is bound. Beside encode*(), add() must be called for every batch.
    ExactRows* exact() const { return exact_.get(); }

    /// Decoded row in the model's space, offset included (n_embd values).
    void read_row(std::int64_t row, const CellPositions& cells, std::span<float> x) const;

    /// Saved form of a row (saved_row.h). Restoring it gives the same bytes: saved state is lossless.
    void save_row(std::int64_t row, const CellPositions& cells, std::span<std::uint16_t> out) const;
    /// Rows first .. first+n-1 from saved form, in[i*n_embd..]. Also rows of other formats of ours and of llama.cpp's own f16 cache. Rows
    /// that cannot be restored become zero, and the result says why. `places`: this tensor sets the positions and offset ids of the cells
    /// (the first key tensor with offset removal), the other key tensors of the cache follow it.
    RestoreResult restore_rows(const Kernels& k, std::int64_t first, std::int64_t n, const std::uint16_t* in, CellPositions& cells,
                               bool places);

    /// Must precede any use of restored rows: exact keys whose offset did not come with other rows are measured anew, as if just written.
    void finish_restore(const Kernels& k, const CellPositions& cells);

    /// Rotates every head of a cached key row by a RoPE table (context shift): decode, rotate, encode. The removed offset moves with the
    /// cell's position by itself.
    void rotate_row(std::int64_t row, const RopeParams& rope, std::span<const float> table);

    /// Copies all cells of a stream.
    void copy_stream(std::int64_t src, std::int64_t dst);

    std::uint64_t shift_generation = 0;  ///< see CellPositions::shift

  private:
    std::int64_t tiles_per_stream() const { return (g_.n_cells + kTileKeys - 1) / kTileKeys; }
    std::size_t head_at(int head) const { return heads_.empty() ? head * tile_bytes(shape()) : heads_[head].at; }
    /// One tile of every head.
    std::size_t tile_stride() const;
    std::uint8_t* tile(std::int64_t row, int head) const;
    int slot(std::int64_t row) const { return static_cast<int>(row % g_.n_cells % kTileKeys); }
    void decode_head(std::int64_t row, int head, std::span<float> x) const;
    bool encode_first_rows(const Kernels& k);
    void measure();
    void set_mask(std::span<const std::int64_t> rows, int head);
    EncodeArgs encode_args(int head, const float* x, std::size_t x_stride, std::span<const std::int64_t> rows,
                           std::span<std::int64_t> scratch) const;
    bool encode_plain(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> rows);
    bool encode_kept(const Kernels& k, int id, const CellPositions& cells, std::span<const std::int64_t> only);
    void place_restored(std::int64_t row, const PackedHeader* packed, const KeyTag& tag, CellPositions& cells);

    Geometry g_;
    std::uint8_t* memory_;
    int head_dim_ = 0;
    std::vector<HeadTiles> heads_;  ///< of mixed formats
    FirstRows first_;
    std::unique_ptr<KeyOffset> offset_;
    void encode_pending(const Kernels& k, const CellPositions& cells, bool measure);

    std::vector<std::int64_t> pending_;         ///< exact keys that were restored, but not compressed yet: their offset is to come
    std::map<std::uint32_t, MuPieces> pieces_;  ///< by hash, of the state that is being restored
    std::unique_ptr<OutlierChannels> outliers_;
    std::unique_ptr<ExactRows> exact_;
};

}  // namespace turboquant
