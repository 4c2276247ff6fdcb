// What the graph tells about a KV tensor beyond its shape: head size, RoPE, positions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/ggml/buffer.h"
#include "turboquant/ggml/graph_walk.h"

namespace turboquant::ggml {

/// Where the tokens stand whose keys a SET_ROWS op on keys writes.
struct RowPositions {
    std::span<const std::int32_t> pos;   ///< empty if the graph does not tell
    std::vector<std::uint8_t> memory{};  ///< of pos, where the graph's is not the host's
    std::vector<std::uint8_t> beside{};  ///< as CellPositions::place takes it; empty but for M-RoPE
};
RowPositions positions_of_rows(const Device& d, const ggml_tensor* set_rows);

}  // namespace turboquant::ggml
