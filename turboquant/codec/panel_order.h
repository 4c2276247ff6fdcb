// TileOrder::panels, the order of the CPU kernels: a tile's codes form a stream in the order in which the attention microkernel reads the
// decoded panel:
//
//   int8 levels, keys:    index(slot, dim) = ((dim/4)*64 + slot)*4 + dim%4         columns = slots, 4 dims per 32-bit lane
//   int8 levels, values:  index(slot, dim) = ((slot/4)*head_dim + dim)*4 + slot%4  columns = dims, 4 slots per 32-bit lane
//   float levels, keys:   index(slot, dim) = dim*64 + slot
//   float levels, values: index(slot, dim) = slot*head_dim + dim
//
// The stream is cut into units of 256 indices; a unit of a b-bit codec is 32*b bytes, made of its bit planes, low bits first (v = the
// unit's 256 indices, l = 0..63):
//   1-bit plane (32 bytes):   little-endian 64-bit word w: bit l = v[64w+l]
//   2-bit plane (64 bytes):   byte l = v[l] | v[64+l]<<2 | v[128+l]<<4 | v[192+l]<<6
//   4-bit plane (128 bytes):  byte 64h+l = v[128h+l] | v[128h+64+l]<<4,  h = 0,1
//   planes of 8 and 16 bits:  v[0], v[1], ... little-endian
// Scales lie in the order of the slots.
#pragma once

#include <cstddef>

#include "turboquant/codec/shape.h"

namespace turboquant::panels {

inline constexpr int kUnit = 256;

/// Position of (slot, dim) in the stream.
constexpr std::size_t index(Levels levels, Side side, int head_dim, int slot, int dim) {
    if (levels == Levels::int8)
        return side == Side::key ? (static_cast<std::size_t>(dim / 4) * kTileKeys + slot) * 4 + dim % 4
                                 : (static_cast<std::size_t>(slot / 4) * head_dim + dim) * 4 + slot % 4;
    return side == Side::key ? static_cast<std::size_t>(dim) * kTileKeys + slot : static_cast<std::size_t>(slot) * head_dim + dim;
}

/// Where in a plane of `width` bits the lowest bit of a unit's index r lies.
constexpr std::size_t plane_bit(int width, std::size_t r) {
    if (width == 1) return r;
    if (width == 2) return r % 64 * 8 + r / 64 * 2;
    if (width == 4) return (r / 128 * 64 + r % 64) * 8 + r / 64 % 2 * 4;
    return width * r;
}

/// See turboquant::code_bit. `c`: the codec of `s`.
constexpr std::size_t code_bit(const CodecInfo& c, const TileShape& s, int slot, int dim, int bit) {
    const std::size_t i = index(c.levels, s.side, s.head_dim, slot, dim);
    std::size_t plane = i / kUnit * kUnit * c.bits;
    for (const int width : c.planes) {
        if (bit < width) return plane + plane_bit(width, i % kUnit) + bit;
        plane += static_cast<std::size_t>(kUnit) * width, bit -= width;
    }
    return plane;  // not reached: the planes of a codec are as wide as its codes
}

}  // namespace turboquant::panels
