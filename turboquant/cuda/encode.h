// Encoding on the GPU: vectors into slots of tiles in fragment order (fragment_order.h), all formats that have one. Raw pointers and plain
// structs: a plan is made once per layer and side, in memory that the caller gives; encode() allocates nothing, reads nothing on the host
// and can be captured in a CUDA graph (cells, positions and values may change between replays, pointers may not).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/attention/attention.h"
#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

struct HeadFormat;  // impl/encode_call.h

/// Everything about the tiles of one side of a layer that does not change, and where the kernels find it.
struct EncodePlan {
    Side side = Side::key;
    int head_dim = 0, n_head = 0;
    NormMode norm_mode = NormMode::corrected;
    std::uint8_t* tiles = nullptr;  ///< device
    std::size_t tile_stride = 0;
    std::size_t row_bytes = 0;          ///< of all heads together, in row form
    const HeadFormat* heads = nullptr;  ///< device
    bool any_scalar = false, any_trellis = false, any_raw = false;
    std::size_t scalar_shared = 0;    ///< bytes of shared memory a block
    int trellis_warps = 0, n_sm = 0;  ///< trellis: warps of a block at most
};

/// Bytes of device memory for a plan's tables.
std::size_t encode_plan_bytes(const TileView& view, int n_head);

/// `view`: the tiles of this side, on the device, of n_head KV heads, 16-byte aligned like all its strides. `memory`: encode_plan_bytes on
/// the device, 16-byte aligned; filled when this returns (the stream is waited for). Formats: those of has_fragment_order(); composites
/// (outlier channels among them) and head sizes that do not fit the card's shared memory are refused by name.
Status plan_encode(const TileView& view, int n_head, NormMode norm_mode, const Device& device, void* memory, Stream stream,
                   EncodePlan& plan);

/// A batch of tokens, all heads. All pointers are device memory.
struct EncodeArgs {
    const void* x =
        nullptr;  ///< x[i*token_stride + h*head_stride + d]: float, or fp16 if x_is_half; 16 (8) bytes aligned, strides multiples of 4
    bool x_is_half = false;
    std::size_t token_stride = 0, head_stride = 0;  ///< in values
    const std::int64_t* cells = nullptr;            ///< of each token: tile cells[i]/64, slot cells[i]%64; no two alike. Negative: none
    int n = 0;

    /// Channel scales (spec/channel_scales.h) that x is multiplied by, [head][head_dim], or null.
    const float* scales = nullptr;
    /// Key offset removal, or null: what is encoded is x[d] - (offset[d] * turn[d] + offset[head_dim + d] * turn[head_dim + d]), turn =
    /// turns + i*2*head_dim (spread_turns, rows.h), offset = offsets + id*offset_stride + h*2*head_dim, id = offset_ids[i]; negative:
    /// nothing is removed.
    const float* turns = nullptr;
    const float* offsets = nullptr;
    const std::int32_t* offset_ids = nullptr;
    std::size_t offset_stride = 0;  ///< in floats

    std::uint32_t* not_finite = nullptr;  ///< set to 1 if a vector holds a NaN or an infinity: it was stored as zero. Never cleared here
};

/// Encodes the batch on the stream. Other slots of the tiles keep their bytes, whatever runs beside on other slots. Same input, same bytes.
Status encode(const EncodePlan& plan, const EncodeArgs& args, Stream stream);

struct EncodeJob {
    EncodePlan plan;
    EncodeArgs args;
};
inline constexpr int kMostEncodeJobs = 16;
/// encode() of several, in one launch where all have as many heads of one size and as many tokens: layers of a step, keys and values of a batch.
Status encode_together(std::span<const EncodeJob> jobs, Stream stream);

}  // namespace turboquant::cuda
