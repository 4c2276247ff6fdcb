// Tiles, in which the cache stores vectors: kTileKeys vectors of one KV head, their codes in an order that the kernels of a device like,
// then (rotated codecs) 64 fp16 scales. An all-zero tile decodes to zero vectors (scale 0). Composites: composite.h.
//
// What holds for every order is the *row form* of a vector: it is what leaves a tile (saved state) and what enters it again, in another
// slot, on the other side, or in another order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/composite.h"
#include "turboquant/codec/panel_order.h"
#include "turboquant/codec/shape.h"

namespace turboquant {

/// Bytes of the codes of a tile: 64*head_dim*bits/8. Not for composites.
constexpr std::size_t tile_code_bytes(const TileShape& s) {
    return static_cast<std::size_t>(kTileKeys) * s.head_dim * codec_info(s.codec).bits / 8;
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

/// Where bit `bit` (0: the lowest) of the code of (slot, dim) lies: bit n of a tile is bit n%8 of its byte n/8. This is all that an order
/// is, beside scale_index. Not for composites.
constexpr std::size_t code_bit(const CodecInfo& c, const TileShape& s, int slot, int dim, int bit) {
    switch (s.order) {
        case TileOrder::panels:
            break;
    }
    return panels::code_bit(c, s, slot, dim, bit);
}

/// Which of the 64 scales after the codes is that of a slot.
constexpr int scale_index(TileOrder order, int slot) {
    switch (order) {
        case TileOrder::panels:
            break;
    }
    return slot;
}

/// Reads / writes one code. `tile`: its first byte. Throws std::invalid_argument for composites.
std::uint32_t get_code(const TileShape& shape, const std::uint8_t* tile, int slot, int dim);
void set_code(const TileShape& shape, std::uint8_t* tile, int slot, int dim, std::uint32_t code);

/// One vector in *row form*: head_dim codes packed LSB-first, `bits` each, in dimension order, then the fp16 scale (rotated codecs); so
/// raw: head_dim fp16 values. Little-endian. Not for composites.
constexpr std::size_t row_bytes(CodecId codec, int head_dim) {
    const CodecInfo& c = codec_info(codec);
    return static_cast<std::size_t>(head_dim) * c.bits / 8 + (c.rotated ? 2 : 0);
}

/// Copies slot `slot` of a tile into row form and back. `row` must hold row_bytes(...) bytes. Throws std::invalid_argument for composites.
/// The definition; the product moves rows by kernels (kernels/rows.h).
void tile_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row);
void tile_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row);

/// Writes / reads a slot (any codec, raw and composites included). Values in the model's space for these; for rotated codecs encode takes
/// the model's space and `tile_decode_rotated` returns the rotated space (what attention works in). Norm mode `corrected` unless given.
/// Both throw std::invalid_argument on a wrong slot, size or head_dim; tile_encode throws std::domain_error on a non-finite value and then
/// leaves the slot as it was. Decoding takes any bytes: a scale that is NaN or infinite gives non-finite values, nothing worse. The
/// definition, too.
void tile_encode(const TileShape& shape, std::uint8_t* tile, int slot, std::span<const float> x, NormMode mode = NormMode::corrected);
void tile_decode_rotated(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> y);

}  // namespace turboquant
