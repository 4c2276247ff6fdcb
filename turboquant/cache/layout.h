// Where the rows of one KV tensor lie, and what they take: arithmetic, no memory.
//
// The cache sees rows: row = stream * n_cells + cell, each of n_embd values (all KV heads of one token). A tensor is laid out as
// [stream][tile][head], tiles of 64 cells (codec/tile.h), so a growing prefix touches memory front to back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/cache/exact_rows.h"
#include "turboquant/spec/head_codecs.h"

namespace turboquant {

/// What is known of a KV tensor when its memory is reserved: all but the size of its heads.
struct KvGeometry {
    Side side = Side::key;
    HeadCodecs codecs = CodecId::turbo4;
    NormMode norm_mode = NormMode::corrected;
    std::int64_t n_embd = 0;   ///< values per row: head_dim * n_head_kv
    std::int64_t n_cells = 0;  ///< rows per stream
    std::int64_t n_streams = 1;
    float outlier_ratio = kOutlierRatio;            ///< see OutlierChannels
    WindowSizes windows{0, 0, WindowForm::halves};  ///< resolved
};

/// Bytes to reserve: the largest need over all head sizes and numbers of outlier channels, that divide n_embd, and what the exact windows
/// take (elsewhere: this is the size that llama.cpp tells its user); rows of fp16 if none does (such a tensor can be allocated, and is
/// refused when its head size is bound).
std::size_t reserved_bytes(const KvGeometry& g);

/// The same tensor with heads of a known size.
class Layout {
  public:
    /// Throws std::invalid_argument if the size is unsupported, does not divide n_embd, or if the heads are not as many as the formats
    /// named.
    Layout(const KvGeometry& g, int head_dim);

    Side side() const { return g_.side; }
    NormMode norm_mode() const { return g_.norm_mode; }
    const HeadCodecs& codecs() const { return g_.codecs; }
    int head_dim() const { return head_dim_; }
    int n_head() const { return static_cast<int>(g_.n_embd / head_dim_); }
    std::size_t n_embd() const { return static_cast<std::size_t>(g_.n_embd); }
    std::int64_t n_cells() const { return g_.n_cells; }
    std::int64_t n_streams() const { return g_.n_streams; }
    std::int64_t n_rows() const { return g_.n_cells * g_.n_streams; }

    /// Outlier channels per head, where the format has some: how many is measured, and changes tiles.
    int n_outliers() const { return n_outliers_; }
    void set_n_outliers(int n) { n_outliers_ = n; }

    /// Of one head; all are alike unless the formats are mixed.
    TileShape shape(int head = 0) const { return {g_.codecs.of(head), g_.side, head_dim_, n_outliers_}; }
    /// Of mixed formats: what is particular to each head; else empty.
    std::span<const HeadTiles> heads() const { return heads_; }

    std::int64_t tiles_per_stream() const { return (g_.n_cells + kTileKeys - 1) / kTileKeys; }
    /// Bytes from a tile of head 0 to that of another head.
    std::size_t head_at(int head) const { return heads_.empty() ? head * tile_bytes(shape()) : heads_[head].at; }
    /// One tile of every head.
    std::size_t tile_stride() const { return head_at(n_head() - 1) + tile_bytes(shape(n_head() - 1)); }
    std::size_t stream_bytes() const { return tiles_per_stream() * tile_stride(); }
    std::size_t bytes() const { return stream_bytes() * g_.n_streams; }

    /// Number of a row in units of cells of whole tiles: tile place/64, slot place%64.
    std::int64_t place(std::int64_t row) const { return row / g_.n_cells * tiles_per_stream() * kTileKeys + row % g_.n_cells; }
    /// Bytes of a row in row form (codec/tile.h), its heads one after the other. Not of composites.
    std::size_t row_bytes() const;

    const WindowSizes& windows() const { return g_.windows; }
    /// Bytes of what is kept of a row of an exact window: fp16 values, or a residual per head (codec/residual.h).
    std::size_t window_row_bytes() const {
        return g_.windows.residual() ? n_head() * residual_bytes(head_dim_) : n_embd() * sizeof(std::uint16_t);
    }

  private:
    KvGeometry g_;
    int head_dim_, n_outliers_ = 0;
    std::vector<HeadTiles> heads_;
};

}  // namespace turboquant
