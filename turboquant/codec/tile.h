// The layout in which the cache stores vectors: tiles of 64 vectors of one head, ordered for the kernels.
//
// A tile holds kTileKeys vectors ("slots") of one KV head. Its values form a stream of kTileKeys*head_dim code indices in *panel order*,
// that is, in the order in which the attention microkernel reads the decoded panel:
//
//   i8 panel, keys:    index(slot, dim) = ((dim/4)*64 + slot)*4 + dim%4        columns = slots, 4 dims per 32-bit lane
//   i8 panel, values:  index(slot, dim) = ((slot/4)*head_dim + dim)*4 + slot%4   columns = dims, 4 slots per 32-bit lane
//   f32 panel, keys:   index(slot, dim) = dim*64 + slot
//   f32 panel, values: index(slot, dim) = slot*head_dim + dim
//
// The stream is cut into units of 256 indices; a unit of a b-bit codec is 32*b bytes, made of bit planes, low bits first (v = the unit's
// 256 indices, l = 0..63):
//   2-bit plane (64 bytes):  byte l = v[l] | v[64+l]<<2 | v[128+l]<<4 | v[192+l]<<6
//   4-bit plane (128 bytes): byte 64h+l = v[128h+l] | v[128h+64+l]<<4,  h = 0,1
//   1-bit plane (32 bytes):  little-endian 64-bit word w: bit l = v[64w+l]
//   turbo2 = 2 | turbo3 = 2+1 | turbo4 = 4 | turbo5 = 4+1 | turbo6 = 4+2 | turbo8 = one byte per index
//   tcq1 = 1 | tcq2 = 1+1 | tcq3 = 2+1 | tcq4 = 2+1+1 | tcq5 = 2+1+1+1: the last plane holds the trellis bits, see trellis.h
//   raw: no indices: the f16 values themselves, in f32-panel order.
//   composites: composite.h.
// After the codes come 64 fp16 scales (rotated codecs only), one per slot. An all-zero tile decodes to zero vectors (scale 0).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/codec/codec.h"

namespace turboquant {

inline constexpr int kTileKeys = 64;

/// Shape of one tile. head_dim must be one of kHeadDims.
struct TileShape {
    CodecId codec;
    Side side;
    int head_dim;
    int n_outliers = 0;  ///< of Family::outliers: channels per head, the same for all heads of a tensor, at most head_dim/2

    friend bool operator==(const TileShape&, const TileShape&) = default;
};

/// Bytes of the codes of a tile: 64*head_dim*bits/8. Not for composites.
constexpr std::size_t tile_code_bytes(const TileShape& s) {
    return static_cast<std::size_t>(kTileKeys) * s.head_dim * codec_info(s.codec).bits / 8;
}

/// Parts of a composite's vector, in stored order: `n` values of `bits` each, with `n_scales` scales.
struct CompositePart {
    int n = 0, bits = 0, n_scales = 0, scale_bytes = 2;

    constexpr std::size_t all_scale_bytes() const { return static_cast<std::size_t>(kTileKeys) * n_scales * scale_bytes; }
};
struct CompositeLayout {
    int mask_bytes = 0;
    CompositePart rest, outliers;  ///< of prod: the MSE code, the sketch

    constexpr std::size_t plane_offset() const { return mask_bytes + rest.all_scale_bytes() + outliers.all_scale_bytes(); }
    constexpr std::size_t bytes() const {
        return plane_offset() + kTileKeys / 8 * static_cast<std::size_t>(rest.n * rest.bits + outliers.n * outliers.bits);
    }
};

inline constexpr int kUniformGroup = 32;

/// See composite.h for what the parts mean.
constexpr CompositeLayout composite_layout(const TileShape& s) {
    const CodecInfo& c = codec_info(s.codec);
    const int d = s.head_dim;
    if (c.family == Family::prod) return {0, {d, c.bits - 1, 1}, {d, 1, 1}};
    if (c.family == Family::uniform) return {0, {d, c.bits, (d + kUniformGroup - 1) / kUniformGroup}, {}};
    const int n = c.family == Family::split ? d / 4 : s.n_outliers;
    return {n ? (d + 7) / 8 : 0, {d - n, c.bits, 1}, {n, c.outlier_bits, n ? 1 : 0, c.family == Family::split ? 2 : 1}};
}

/// Bytes of a whole tile: codes, then 64 fp16 scales for rotated codecs.
constexpr std::size_t tile_bytes(const TileShape& s) {
    if (is_composite(s.codec)) return composite_layout(s).bytes();
    return tile_code_bytes(s) + (codec_info(s.codec).rotated ? kTileKeys * sizeof(std::uint16_t) : 0);
}

/// Bits stored per value, scales and masks included.
constexpr double bits_per_value(const TileShape& s) { return 8.0 * static_cast<double>(tile_bytes(s)) / (kTileKeys * s.head_dim); }
/// The same without outliers, for formats where their number is measured.
constexpr double bits_per_value(CodecId id, int head_dim) { return bits_per_value(TileShape{id, Side::key, head_dim}); }

/// Position of (slot, dim) in the tile's stream of indices, see the table above.
constexpr std::size_t panel_index(PanelKind panel, Side side, int head_dim, int slot, int dim) {
    if (panel == PanelKind::i8)
        return side == Side::key ? (static_cast<std::size_t>(dim / 4) * kTileKeys + slot) * 4 + dim % 4
                                 : (static_cast<std::size_t>(slot / 4) * head_dim + dim) * 4 + slot % 4;
    return side == Side::key ? static_cast<std::size_t>(dim) * kTileKeys + slot : static_cast<std::size_t>(slot) * head_dim + dim;
}

/// Reads / writes one code index at stream position `index` (scalar specification of the bit planes above).
/// `codes` is the tile's first byte. Not for raw and composites.
std::uint32_t get_code(CodecId codec, const std::uint8_t* codes, std::size_t index);
void set_code(CodecId codec, std::uint8_t* codes, std::size_t index, std::uint32_t code);

/// One vector in *row form*: the portable serialization used by saved state. head_dim code indices packed LSB-first, `bits` each, in
/// dimension order, then the fp16 scale (rotated codecs); raw: head_dim fp16 values. Little-endian. Not for composites.
constexpr std::size_t row_bytes(CodecId codec, int head_dim) {
    const CodecInfo& c = codec_info(codec);
    return static_cast<std::size_t>(head_dim) * c.bits / 8 + (c.rotated ? 2 : 0);
}

/// Copies slot `slot` of a tile into row form and back. `row` must hold row_bytes(...) bytes. Throws std::invalid_argument for composites.
void tile_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row);
void tile_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row);

}  // namespace turboquant
