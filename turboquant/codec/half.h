// IEEE binary16.
#pragma once

#include <cstdint>

namespace turboquant {

/// IEEE binary16 <-> binary32, round to nearest even. Overflow saturates to the largest finite half (a scale must stay finite);
/// a NaN stays one.
std::uint16_t to_half(float x);
float from_half(std::uint16_t h);

}  // namespace turboquant
