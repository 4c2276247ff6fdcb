// Composite formats: what other schemes do, as real packed formats, so that their claims can be measured beside ours (docs/outliers.md).
//
// A vector is quantized in up to two parts and decoded back into the model's space, all 64 slots of a tile at once; attention reads a float
// panel and rotates nothing. Simple rather than fast.
//
// outlier<b>    Dynamic outlier channels: those of large RMS, chosen per head (cache/outlier_channels.h), at 8 bits, uniform levels between
// -a and a, a their largest magnitude in this vector; the others rotated among themselves, Lloyd-Max at b bits, one scale.
//
// split<b>_<c>  The fixed split of TurboQuant, arXiv:2504.19874, sec. 4.3: the quarter of the channels with the largest RMS (32 of 128) at
// c bits, the others at b, each part with its own rotation, codebook and scale.
//
// prod<b>       Algorithm 2 of the same paper (prod.h): b-1 bits of Lloyd-Max, 1 bit of QJL sketch of the residual, two norms.
//
// uniform<b>    No rotation: b-bit uniform levels between -a and a, a the largest magnitude in a group of 32 channels (4 bits: 4.5 bits in
// all).
//
// Tile (sizes: composite_layout below), little-endian, in this order:
//
// 1. Mask: head_dim bits, 1 = outlier channel; only if there are outliers. All tiles of a head hold the same; it is counted in the bits.
//
// 2. Scales of the parts in order, scale k of slot s at k*64 + s: fp16. Magnitudes `a` of uniform<b> are rounded to 8 significant bits,
// those of outlier<b> are rounded up to 4 and stored in one byte, the upper 8 bits of an fp16 value without its sign.
//
// 3. Bit planes: per stored value 64-bit words, lowest bit first, one per bit: bit s of a word belongs to slot s. Stored order: the
// channels that are not outliers, ascending (rotated, if the part is), then the outliers; for prod the MSE codes, then the signs.
//
// A tile of zeros decodes to zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/shape.h"

namespace turboquant {

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

/// What the parts mean is said above.
constexpr CompositeLayout composite_layout(const TileShape& s) {
    const CodecInfo& c = codec_info(s.codec);
    const int d = s.head_dim;
    if (c.family == Family::prod) return {0, {d, c.bits - 1, 1}, {d, 1, 1}};
    if (c.family == Family::uniform) return {0, {d, c.bits, (d + kUniformGroup - 1) / kUniformGroup}, {}};
    const int n = c.family == Family::split ? d / 4 : s.n_outliers;
    return {n ? (d + 7) / 8 : 0, {d - n, c.bits, 1}, {n, c.outlier_bits, n ? 1 : 0, c.family == Family::split ? 2 : 1}};
}

/// Outlier channels per head of a shape; 0 for formats without.
constexpr int outlier_count(const TileShape& s) { return has_outliers(s.codec) ? composite_layout(s).outliers.n : 0; }

/// Writes the mask into a tile: outlier[i] != 0 for exactly outlier_count(shape) of the head_dim channels (std::invalid_argument
/// otherwise). It decides what the bytes of all slots mean: write it before the first of them, and the same again, or nothing, later.
/// Nothing to do without outliers.
void composite_set_mask(const TileShape& shape, std::uint8_t* tile, std::span<const std::uint8_t> outlier);

/// Encodes x (head_dim values, model's space) into a slot. A tile without a mask gets that of the first channels.
/// Throws std::invalid_argument on wrong sizes, std::domain_error on a non-finite value (the slot then stays as it was).
void composite_encode(const TileShape& shape, std::uint8_t* tile, int slot, std::span<const float> x, NormMode mode);

/// Decodes all slots, in the model's space: x[dim*64 + slot], head_dim*64 values. Takes any bytes: a tile whose mask does not fit its shape
/// decodes to zeros.
void composite_decode(const TileShape& shape, const std::uint8_t* tile, float* x);
/// One slot alone, head_dim values.
void composite_decode_slot(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> x);

}  // namespace turboquant
