#include "turboquant/spec/channel_scales.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace turboquant {
namespace {

constexpr int kLetters = 26;

}  // namespace

std::string scale_letters(std::span<const float> scales) {
    std::string letters;
    for (const float s : scales) {
        const int step = std::clamp(static_cast<int>(std::lround(kScaleStepsPerOctave * std::log2(s))), -kLetters, kLetters - 1);
        letters += static_cast<char>(step < 0 ? 'A' + kLetters + step : 'a' + step);
    }
    return letters;
}

std::vector<float> parse_scales(std::string_view letters) {
    std::vector<float> scales;
    for (const char c : letters) {
        const bool up = c >= 'a' && c <= 'z';
        if (!up && !(c >= 'A' && c <= 'Z'))
            throw std::invalid_argument(std::string("channel scales hold '") + c +
                                        "'; they are written as letters: 'a' is 1, 'b' an eighth of an octave more, 'Z' an eighth less");
        scales.push_back(std::exp2(static_cast<float>(up ? c - 'a' : c - 'A' - kLetters) / kScaleStepsPerOctave));
    }
    return scales;
}

}  // namespace turboquant
