#include "turboquant/codec/quantizer.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace turboquant {
namespace {

constexpr double kMaxHalf = 65504;

void check_size(std::size_t got, int head_dim) {
    if (got != static_cast<std::size_t>(head_dim))
        throw std::invalid_argument("quantizer: got " + std::to_string(got) + " values for head_dim " + std::to_string(head_dim));
}

// Sum of squares in double, which floats cannot overflow; so it is finite exactly if all values are.
double finite_norm(std::span<const float> x) {
    double sum = 0;
    for (float v : x) sum += static_cast<double>(v) * v;
    if (!std::isfinite(sum)) throw std::domain_error("quantizer: the vector holds a NaN or an infinity; check the model's activations");
    return std::sqrt(sum);
}

}  // namespace

Quantizer::Quantizer(CodecId codec, int head_dim, NormMode mode) : codec_(codec), head_dim_(head_dim), mode_(mode) {
    if (!codec_info(codec).rotated)
        throw std::invalid_argument("quantizer: codec '" + std::string(codec_info(codec).name) + "' is not of this kind");
    rotation_ = &rotation_for(head_dim);
    if (codec_info(codec).family == Family::trellis)
        trellis_ = &trellis_for(codec_info(codec).bits, head_dim);
    else
        codebook_ = &codebook_for(codec_info(codec).bits, head_dim);
}

namespace {

// Algorithm 1; `encode` writes the codes of a rotated unit vector and their levels.
template <class Encode>
QuantizedVector quantize_with(const Rotation& rotation, NormMode mode, std::span<const float> x, Encode encode) {
    check_size(x.size(), rotation.head_dim());
    const double norm = finite_norm(x);
    QuantizedVector out;
    std::vector<float> y(x.size()), levels(x.size());
    if (norm > 0)
        for (std::size_t i = 0; i < x.size(); ++i) y[i] = static_cast<float>(x[i] / norm);
    rotation.forward(y);
    out.codes.resize(x.size());
    encode(y, out.codes, levels);
    double cc = 0, yc = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double c = levels[i];
        cc += c * c;
        yc += c * y[i];
    }
    double scale = norm;
    if (norm > 0 && mode == NormMode::corrected) scale = norm / std::sqrt(cc);
    if (norm > 0 && mode == NormMode::eden) scale = norm / yc;  // positive: the levels are nearer to y than 0 is
    out.scale = from_half(to_half(static_cast<float>(std::min(scale, kMaxHalf))));
    return out;
}

void levels_of(const TrellisCodebook& book, std::span<const std::uint8_t> codes, std::span<float> levels) {
    std::vector<std::uint8_t> index(codes.size());
    trellis_levels(book, codes, index);
    for (std::size_t i = 0; i < codes.size(); ++i) levels[i] = book.centroids[index[i]];
}

}  // namespace

QuantizedVector quantize_mse(const Rotation& rotation, const Codebook& codebook, NormMode mode, std::span<const float> x) {
    return quantize_with(rotation, mode, x, [&](std::span<const float> y, std::span<std::uint8_t> codes, std::span<float> levels) {
        for (std::size_t i = 0; i < y.size(); ++i) {
            codes[i] = static_cast<std::uint8_t>(codebook.quantize(y[i]));
            levels[i] = codebook.centroids[codes[i]];
        }
    });
}

QuantizedVector Quantizer::quantize(std::span<const float> x) const {
    if (!trellis_) return quantize_mse(*rotation_, *codebook_, mode_, x);
    return quantize_with(*rotation_, mode_, x, [&](std::span<const float> y, std::span<std::uint8_t> codes, std::span<float> levels) {
        trellis_encode(*trellis_, y, codes);
        levels_of(*trellis_, codes, levels);
    });
}

void Quantizer::dequantize_rotated(const QuantizedVector& q, std::span<float> y) const {
    check_size(y.size(), head_dim_);
    check_size(q.codes.size(), head_dim_);
    for (const std::uint8_t code : q.codes)
        if (code >> codec_info(codec_).bits) throw std::invalid_argument("quantizer: code out of range");
    if (trellis_)
        levels_of(*trellis_, q.codes, y);
    else
        for (int i = 0; i < head_dim_; ++i) y[i] = codebook_->centroids[q.codes[i]];
    for (float& v : y) v *= q.scale;
}

void Quantizer::dequantize(const QuantizedVector& q, std::span<float> x) const {
    dequantize_rotated(q, x);
    rotation_->inverse(x);
}

}  // namespace turboquant
