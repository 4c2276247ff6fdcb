#include "turboquant/codec/residual.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/half.h"

namespace turboquant {

void residual_encode(std::span<const float> left, std::uint8_t* row) {
    const auto d = static_cast<int>(left.size());
    const Codebook& book = codebook_for(kResidualBits, d);
    std::fill_n(row, residual_bytes(d), std::uint8_t{0});
    float most = 0;
    for (const float v : left) {
        if (!std::isfinite(v)) throw std::domain_error("residual: a value is not finite");
        most = std::max(most, std::abs(v));
    }
    if (!(most > kNoResidual)) return;
    const float stretch = book.centroids.back() / most;
    double cc = 0, yc = 0;
    for (int i = 0; i < d; ++i) {
        const std::uint32_t code = book.quantize(left[i] * stretch);
        const double c = book.centroids[code];
        cc += c * c, yc += c * left[i];
        row[i % (d / 2)] |= static_cast<std::uint8_t>(i < d / 2 ? code : code << kResidualBits);
    }
    const std::uint16_t scale = to_half(static_cast<float>(yc / cc));
    row[d / 2] = static_cast<std::uint8_t>(scale), row[d / 2 + 1] = static_cast<std::uint8_t>(scale >> 8);
}

void residual_add(const std::uint8_t* row, std::span<float> y) {
    const std::size_t d = y.size();
    const Codebook& book = codebook_for(kResidualBits, static_cast<int>(d));
    const float scale = from_half(static_cast<std::uint16_t>(row[d / 2] | row[d / 2 + 1] << 8));
    for (std::size_t i = 0; i < d; ++i) {
        const std::uint8_t code = i < d / 2 ? row[i] & 15 : row[i - d / 2] >> kResidualBits;
        y[i] += scale * book.centroids[code];
    }
}

}  // namespace turboquant
