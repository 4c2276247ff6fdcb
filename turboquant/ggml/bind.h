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

/// Positions of the tokens whose keys a SET_ROWS op on keys writes: empty if the graph does not tell.
std::span<const std::int32_t> positions_of_rows(const Device& d, const ggml_tensor* set_rows);

}  // namespace turboquant::ggml
