// What the encoding kernels are handed: constants of a format, in device memory, and one call. Plain data.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/cuda/fragment_order.h"

namespace turboquant::cuda {

inline constexpr int kMaxCells = 1024;

/// Uniform cells over a codebook's range, so narrow that each holds at most one boundary.
struct QuantizerCell {
    float bound;          ///< in this cell, or infinite
    std::uint32_t below;  ///< 4 * the code below it (scalar: of the positive half; trellis: of all levels)
};

/// Constants of one (codec, head size).
struct FormatTables {
    CodecId codec;
    Family family;
    int bits, head_dim;
    int rows;   ///< fragment_rows
    int exact;  ///< the second factor of the rotation is +-1: its low parts are zero
    int pow2, odd;
    float hartley[81];  ///< [odd][odd]
    float unit_scale;   ///< of a coordinate of the unit vector, per unit of the accumulators
    float cells_per_unit;
    int n_cells;
    int half;                                                               ///< scalar: 2^(bits-1)
    float cost_scale;                                                       ///< trellis
    std::uint32_t signs_in[kMaxHeadDim / 32], signs_out[kMaxHeadDim / 32];  ///< bit dim: -1
    std::uint32_t rotation_high[25 * 32], rotation_low[25 * 32];            ///< [k tile][n tile][lane]: rotate.h
    QuantizerCell cells[kMaxCells];
    /// scalar: [half + k], the k-th positive level; trellis: the levels, ascending, after and before four that are out of reach.
    float levels[256];
};

struct HeadFormat {
    const FormatTables* tables;
    std::size_t at;      ///< bytes from the tiles' start to tile 0 of this head
    std::size_t row_at;  ///< bytes from the start of a row in row form to this head's part
};

struct EncodeCall {
    const HeadFormat* heads;
    Side side;
    NormMode norm_mode;
    std::uint8_t* tiles;
    std::size_t tile_stride;
    const void* x;
    int half_input;
    std::size_t token_stride, head_stride;  ///< of x, in values
    const std::int64_t* cells;
    int n, tokens_per_block;
    const float* scales;             ///< [head][head_dim] or null
    const float* turns;              ///< [n][2*head_dim] or null
    const float* offsets;            ///< offset_stride floats per id, of which [head][2*head_dim]
    const std::int32_t* offset_ids;  ///< [n], negative: none
    std::size_t offset_stride;
    std::uint32_t* not_finite;  ///< becomes 1 if a vector is not
};

/// Of several plans, alike but for what the call says: blockIdx.z is the call.
struct EncodeCalls {
    EncodeCall of[16];
};

}  // namespace turboquant::cuda
