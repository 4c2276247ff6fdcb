// The MSE quantizer: the scalar specification that every kernel is tested against.
// Source: TurboQuant, arXiv:2504.19874, Algorithm 1 (TurboQuant_mse).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/codec.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/tile.h"
#include "turboquant/codec/trellis.h"

namespace turboquant {

/// IEEE binary16 <-> binary32, round to nearest even. Overflow saturates to the largest finite half (a scale must stay finite);
/// a NaN stays one.
std::uint16_t to_half(float x);
float from_half(std::uint16_t h);

/// Result of quantizing one vector.
struct QuantizedVector {
    std::vector<std::uint8_t> codes;  ///< head_dim indices in dimension order of the rotated space
    float scale = 0;                  ///< as stored (fp16-rounded)
};

/// Algorithm 1 itself, for any codebook: n = |x|; y = R(x/n); c_i = nearest centroid; scale by NormMode, saturating at the largest half.
/// A zero vector gets scale 0. Throws std::domain_error on a non-finite value, std::invalid_argument if the sizes differ.
QuantizedVector quantize_mse(const Rotation& rotation, const Codebook& codebook, NormMode mode, std::span<const float> x);

/// Quantizes vectors of one head size with one of the rotated codecs.
class Quantizer {
  public:
    /// Throws std::invalid_argument if head_dim is unsupported or the codec is not of Family::scalar.
    Quantizer(CodecId codec, int head_dim, NormMode mode = NormMode::corrected);

    CodecId codec() const { return codec_; }
    int head_dim() const { return head_dim_; }
    NormMode mode() const { return mode_; }
    const Rotation& rotation() const { return *rotation_; }
    const Codebook& codebook() const { return *codebook_; }  ///< not of trellis codecs

    /// x: head_dim values in the model's space. See quantize_mse.
    QuantizedVector quantize(std::span<const float> x) const;

    /// Reconstruction in the model's space (inverse rotation applied) / in the rotated space.
    /// Throws std::invalid_argument on a wrong size or a code outside the codebook.
    void dequantize(const QuantizedVector& q, std::span<float> x) const;
    void dequantize_rotated(const QuantizedVector& q, std::span<float> y) const;

  private:
    CodecId codec_;
    int head_dim_;
    NormMode mode_;
    const Rotation* rotation_;
    const Codebook* codebook_ = nullptr;        // one of
    const TrellisCodebook* trellis_ = nullptr;  // these two
};

/// Scalar specification of writing / reading a tile slot (any codec, raw and composites included). Values in the model's space for these;
/// for rotated codecs encode takes the model's space and `tile_decode_rotated` returns the rotated space (what attention works in). Norm
/// mode `corrected` unless given. Both throw std::invalid_argument on a wrong slot, size or head_dim; tile_encode throws std::domain_error
/// on a non-finite value and then leaves the slot as it was. Decoding takes any bytes: a scale that is NaN or infinite gives non-finite
/// values, nothing worse.
void tile_encode(const TileShape& shape, std::uint8_t* tile, int slot, std::span<const float> x, NormMode mode = NormMode::corrected);
void tile_decode_rotated(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> y);

}  // namespace turboquant
