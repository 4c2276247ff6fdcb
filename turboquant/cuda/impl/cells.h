// Look-up of a codebook's cell by a float's own mantissa.
#pragma once

#include "turboquant/cuda/impl/simt.h"

namespace turboquant::cuda {

/// Byte offset of cell floor(u + 1/16) in a table of QuantizerCell, at most that of cell `last`: from the mantissa of a sum.
TQ_DEVICE std::uint32_t cell_offset(float u, float last) {
    constexpr float kBase = 1 << 20;  // steps of 1/8
    return float_bits(fminf(u + kBase, last + kBase)) & 0x1ff8u;
}

}  // namespace turboquant::cuda
