#include "turboquant/attention/turns.h"

#include <algorithm>
#include <cmath>

namespace turboquant {

std::vector<float> make_turns(std::span<const double> frequencies) {
    const std::size_t n = frequencies.size(), width = turn_width(static_cast<int>(n));
    std::vector<float> turns(kTurnDigits * kTurnRadix * 2 * width);
    double unit = 1;
    for (int k = 0; k < kTurnDigits; k++, unit *= kTurnRadix)
        for (int r = 0; r < kTurnRadix; r++)
            for (std::size_t i = 0; i < n; i++) {
                float* row = turns.data() + (k * kTurnRadix + r) * 2 * width;
                row[i] = static_cast<float>(std::cos(r * unit * frequencies[i]));
                row[width + i] = static_cast<float>(std::sin(r * unit * frequencies[i]));
            }
    return turns;
}

void turn_row(const float* turns, int n_freq, std::int32_t pos, float* row) {
    const int width = turn_width(n_freq);
    const auto digit_row = [&](int k) { return turns + (k * kTurnRadix + (pos >> 6 * k) % kTurnRadix) * 2 * width; };
    std::copy_n(digit_row(0), 2 * width, row);
    for (int k = 1; k < kTurnDigits && pos >> 6 * k; k++) {
        const float* by = digit_row(k);
        for (int i = 0; i < width; i++) {
            const float c = row[i], s = row[width + i];
            row[i] = c * by[i] - s * by[width + i];
            row[width + i] = s * by[i] + c * by[width + i];
        }
    }
}

}  // namespace turboquant
