// What the graph tells about a KV tensor beyond its shape: head size, RoPE, positions.
#pragma once

#include <cstring>
#include <span>

#include "turboquant/ggml/buffer.h"

namespace turboquant::ggml {

inline constexpr int kRopeSplitPairs = 2, kRopeMultiAxis = 8, kRopeVision = 24;  ///< bits of ggml's RoPE mode

/// op_params are 32-bit words; some hold floats.
inline float float_param(const ggml_tensor* t, int i) {
    float f;
    std::memcpy(&f, &t->op_params[i], sizeof f);
    return f;
}

/// Parameters of a ROPE op; freq_factors points into its src[2].
RopeParams rope_params(const ggml_tensor* rope);

/// Stores the positions of rows that a SET_ROWS op on keys writes, if this layer is the one to do it (CellPositions::setter).
void set_positions(const Device& d, KvExtra& e, const ggml_tensor* set_rows, std::span<const std::int64_t> rows);

/// Whether the offset is removed from a layer's keys. Not where a layer without RoPE shares its cells with layers that have it: the
/// positions, and with them the offsets of the sequences, are known only when the first of those runs.
bool removes_offset(const KvExtra& e);

}  // namespace turboquant::ggml
