// The MSE quantizer: the scalar specification that every kernel is tested against.
// Source: TurboQuant, arXiv:2504.19874, Algorithm 1 (TurboQuant_mse).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/codec.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/trellis.h"

namespace turboquant {

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
    /// Throws std::invalid_argument if head_dim is unsupported or the codec is not a rotated one.
    Quantizer(CodecId codec, int head_dim, NormMode mode = NormMode::corrected);

    CodecId codec() const { return codec_; }
    int head_dim() const { return head_dim_; }
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

}  // namespace turboquant
