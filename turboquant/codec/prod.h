// The Prod (QJL) quantizer: unbiased inner products at (bits-1) bits of MSE code and 1 bit of sign sketch. Never the default: its
// inner-product variance is 4-6x that of the scale-corrected MSE quantizer and softmax amplifies it (docs/codec.md).
// Source: TurboQuant, arXiv:2504.19874, Algorithm 2 (TurboQuant_prod); QJL, arXiv:2406.03482.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/codec/quantizer.h"

namespace turboquant {

struct ProdVector {
    QuantizedVector mse;              ///< (bits-1)-bit code of x, NormMode::plain
    std::vector<std::uint8_t> signs;  ///< head_dim signs (0/1) of S*r, r the residual in the rotated space
    float residual_norm = 0;          ///< |r|, fp16-rounded
};

/// The quantizer of Algorithm 2 for one head size. Immutable after construction.
class ProdQuantizer {
  public:
    /// bits in 2..5 (total: bits-1 for the MSE part, 1 for the sketch); seed draws S. Throws std::invalid_argument.
    ProdQuantizer(int bits, int head_dim, std::uint64_t seed = 1042);

    /// x: head_dim values in the model's space. Throws as quantize_mse.
    ProdVector quantize(std::span<const float> x) const;

    /// Dense reconstruction in the model's space (paper, Algorithm 2, Dequant_prod): its inner product with q estimates <q, x> as
    /// <q, x_mse> + sqrt(pi/2)/d * |r| * <S R q, sign(S r)>. Throws std::invalid_argument on a wrong size or code.
    void dequantize(const ProdVector& v, std::span<float> x) const;

    int head_dim() const { return head_dim_; }
    const Rotation& rotation() const { return *rotation_; }
    std::span<const float> sketch() const { return sketch_; }  ///< S, row-major
    float sketch_gain() const;                                 ///< sqrt(pi/2)/head_dim

  private:
    int head_dim_;
    const Rotation* rotation_;
    const Codebook* codebook_;   ///< of bits-1
    std::vector<float> sketch_;  ///< S, head_dim x head_dim, N(0,1), row-major
};

/// Shared instance with the default seed (made once, thread-safe). Throws as the constructor.
const ProdQuantizer& prod_quantizer_for(int bits, int head_dim);

}  // namespace turboquant
