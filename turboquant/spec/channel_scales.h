// Scales of key channels: a key is multiplied by them before it is rotated and quantized, a query is divided by them, so that scores stay
// what they are. After rotation the error is spread evenly over the channels; scaling moves it to where queries are small
// (planner/key_balance.h chooses them).
//
// They are written as letters, one a channel, in steps of an eighth of an octave: 'a' is 1, 'b' 2^(1/8) ... 'z' 2^(25/8), and downwards 'Z'
// is 2^(-1/8) ... 'A' 2^(-26/8). So a head of 128 takes 128 bytes, in a SPEC, in a plan, and in the bits that are counted.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant {

inline constexpr int kScaleStepsPerOctave = 8;

/// Nearest letters; scales beyond the range get its ends. Scales must be positive.
std::string scale_letters(std::span<const float> scales);
/// Throws std::invalid_argument if there is a character that is no letter.
std::vector<float> parse_scales(std::string_view letters);

}  // namespace turboquant
