// What the graph tells about a KV tensor beyond its shape: head size, RoPE, positions.
#pragma once

#include <span>

#include "turboquant/ggml/buffer.h"
#include "turboquant/ggml/graph_walk.h"

namespace turboquant::ggml {

/// Positions of the tokens whose keys a SET_ROWS op on keys writes: empty if the graph does not tell.
std::span<const std::int32_t> positions_of_rows(const Device& d, const ggml_tensor* set_rows);

}  // namespace turboquant::ggml
