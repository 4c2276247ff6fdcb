// Bulk moves of vectors in and out of tiles, all KV heads, on the caller's threads: row form for saved state, decoded rows for operations
// that cannot read tiles, and rotation of keys (context shift). Tested against the definitions in codec/tile.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/attention/attention.h"
#include "turboquant/kernels/executor.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant {

/// The tiles of all KV heads of one stream, to be read and written; as TileView (attention/attention.h).
struct StreamTiles {
    TileShape shape;
    std::uint8_t* tiles = nullptr;  ///< tile 0 of KV head 0
    std::size_t head_stride = 0;    ///< bytes between the same tile of successive KV heads
    std::size_t tile_stride = 0;    ///< bytes between successive tiles of one KV head
    int n_head = 0;
    const HeadTiles* heads = nullptr;  ///< [n_head], or null: all heads are as `shape` says

    StreamTiles() = default;
    /// `tiles`: what view.tiles points to.
    StreamTiles(const TileView& view, std::uint8_t* memory, int n)
        : shape(view.shape), tiles(memory), head_stride(view.head_stride), tile_stride(view.tile_stride), n_head(n), heads(view.heads) {}
    TileShape head_shape(int h) const { return heads ? TileShape{heads[h].codec, shape.side, shape.head_dim, shape.n_outliers} : shape; }
    std::uint8_t* head_tiles(int h) const { return tiles + (heads ? heads[h].at : static_cast<std::size_t>(h) * head_stride); }
};

// cells[i] is the cell of row i: tile cells[i]/64, slot cells[i]%64. Ascending, each once: neighbours in a tile are moved together, and different tiles
// at the same time.

/// Row forms: the heads' row_bytes(codec, head_dim) one after the other at rows + i*stride. Bit for bit. Throws std::invalid_argument for
/// composites, which have none.
void get_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, std::uint8_t* rows,
              std::size_t stride);
void set_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, const std::uint8_t* rows,
              std::size_t stride);

/// Where decoded rows go, and what is given back to them.
struct DecodedRows {
    float* x = nullptr;               ///< x[i*stride + h*head_dim + d], or null
    std::uint16_t* halves = nullptr;  ///< the same in fp16 (beyond it the largest), or null
    std::size_t stride = 0;           ///< values
    /// A removed key offset, or null: as EncodeArgs (kernels.h), added back; [n_head][2][head_dim] at offsets[i].
    const float* turns = nullptr;
    const float* const* offsets = nullptr;
    const float* unscale = nullptr;  ///< [n_head][head_dim] factors on what was decoded (1/scale of the key channels), or null
};
/// Vectors in the model's space. Any codec; any bytes: a scale that is not finite gives values that are not.
void decode_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells,
                 const DecodedRows& out);

/// Rotates every head of the rows by tables[i] (cosine and sine of each pair) and encodes it again. False if a vector was not finite: that
/// slot is then zero.
bool rotate_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, const PairTurn& pairs,
                 std::span<const float* const> tables, NormMode mode);

}  // namespace turboquant
