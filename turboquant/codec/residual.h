// Residuals: what a code leaves of a vector, coded in 4 bits per value of its own. Exact windows are kept so (cache/exact_rows.h).
//
//   y = code + residual + what is lost       y: a vector in the rotated space; code: of any rotated format, stored anyway
//
// The residual is coded where the code is, without a rotation of its own, so that attention adds it to the tile it belongs to. What a
// Lloyd-Max cell leaves is nearly uniform, with a few large values beyond the outermost level: the levels of turbo4 are stretched to the
// largest value instead of the norm, and the scale is the one of least squares. About 1 % of the code's squared error is left (.9 % at head
// size 64, 1.3 % at 128, 2.2 % at 256; of a normal variable 4 bits leave .95 %).
//
// Row of a head: byte i has the code of dim i in its low half and that of dim i + head_dim/2 in its high one, i < head_dim/2; then the scale,
// fp16, little-endian.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace turboquant {

inline constexpr int kResidualBits = 4;

/// Residuals of no larger values are zero: their scale would be no fp16 number.
inline constexpr float kNoResidual = 1e-30f;

/// Bytes of a residual of one head.
constexpr std::size_t residual_bytes(int head_dim) { return static_cast<std::size_t>(head_dim) / 2 + 2; }

/// Codes y - code, `left` (its size is the head size, one of kHeadDims). All zero where it is zero. The definition; the product uses
/// kernels (kernels/kernels.h). Throws std::domain_error if a value is not finite.
void residual_encode(std::span<const float> left, std::uint8_t* row);
/// Adds what `row` holds to y.
void residual_add(const std::uint8_t* row, std::span<float> y);

}  // namespace turboquant
