// Rows of a cache on the GPU: out of it and in (row form, codec/tile.h: saved state), decoded, turned to other positions, copied, cleared.
// As encode.h: nothing is allocated, everything can be captured.
#pragma once

#include "turboquant/cuda/encode.h"

namespace turboquant::cuda {

/// Rows of n cells, each of the row form of all heads, one after the other (plan.row_bytes); row_stride bytes between rows. Device memory.
/// Negative cells are passed over. get_rows writes their bytes as zero.
Status get_rows(const EncodePlan& plan, const std::int64_t* cells, int n, std::uint8_t* rows, std::size_t row_stride, Stream stream);
Status set_rows(const EncodePlan& plan, const std::int64_t* cells, int n, const std::uint8_t* rows, std::size_t row_stride, Stream stream);

/// Which dims RoPE turns, and into each other: of pair i the dims n_offset + 2i and the next one, or n_offset + i and that n_dims/2 on.
struct RopeLayout {
    int n_dims = 0, n_offset = 0;
    bool adjacent = false;
};

struct DecodeArgs {
    const std::int64_t* cells = nullptr;
    int n = 0;
    void* out = nullptr;  ///< out[i*token_stride + h*head_stride + d]: float, or fp16 if out_is_half; the model's space
    bool out_is_half = true;
    std::size_t token_stride = 0, head_stride = 0;
    /// What encode() took is given back: the offset is added (as EncodeArgs), then the scales are divided by. Null: not.
    const float* scales = nullptr;
    const float* turns = nullptr;
    const float* offsets = nullptr;
    const std::int32_t* offset_ids = nullptr;
    std::size_t offset_stride = 0;
    /// Turned on by RoPE before that (context shift), by [n][2*head_dim] cosines and sines (spread_turns of the shifts), or null.
    const float* shift_turns = nullptr;
    RopeLayout rope;
};

/// Decoded rows, for operations that read a cache's rows as fp16. Cells that are negative give zeros.
Status decode_rows(const EncodePlan& plan, const DecodeArgs& args, Stream stream);

/// Context shift: keys of n cells are decoded, turned by their shift and encoded again, in place. The offset stays taken out: R(s) R(p) mu
/// = R(p + s) mu. workspace: n * n_head * head_dim floats on the device, 16-byte aligned; not_finite as in EncodeArgs.
Status rotate_rows(const EncodePlan& plan, const std::int64_t* cells, int n, const float* shift_turns, const RopeLayout& rope,
                   float* workspace, std::uint32_t* not_finite, Stream stream);

/// Cosines and sines that apply to each dim at n positions, out[i][2*head_dim] (cosines, then sines; 1 and 0 for dims that RoPE leaves
/// alone and for negative positions). digits: attention/turns.h's table of n_freq frequencies, on the device; frequency i is that of pair
/// i. The same for all heads and layers that share the frequencies.
Status spread_turns(const float* digits, int n_freq, const RopeLayout& rope, int head_dim, const std::int32_t* positions, int n, float* out,
                    Stream stream);

/// Whole streams of a cache, or any run of tiles: copies `bytes` from src to dst (they must not overlap), or makes all codes and scales
/// zero, which decodes to zero vectors.
Status copy_tiles(void* dst, const void* src, std::size_t bytes, Stream stream);
Status clear_tiles(void* tiles, std::size_t bytes, Stream stream);

}  // namespace turboquant::cuda
