// IEEE binary16 conversion in integer arithmetic: the same on every machine and compiler, whatever its rounding mode or half support.
#include "turboquant/codec/half.h"

#include <bit>

namespace turboquant {

std::uint16_t to_half(float x) {
    const std::uint32_t u = std::bit_cast<std::uint32_t>(x), magnitude = u & 0x7fffffffu;
    const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;   // NaN
    if (magnitude >= 0x477ff000u) return sign | 0x7bffu;  // would round to 2^16 or is infinite: largest finite half
    if (magnitude < 0x38800000u) {                        // below 2^-14: subnormal, in steps of 2^-24
        const int shift = 126 - static_cast<int>(magnitude >> 23);
        if (shift > 24) return sign;
        const std::uint32_t m = (magnitude & 0x7fffffu) | 0x800000u, kept = m >> shift, rest = m & ((1u << shift) - 1),
                            half = 1u << (shift - 1);
        return static_cast<std::uint16_t>(sign | (kept + (rest > half || (rest == half && (kept & 1)))));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

float from_half(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        const float v = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -v : v;
    }
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace turboquant
