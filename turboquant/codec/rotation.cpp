#include "turboquant/codec/rotation.h"

#include <array>
#include <cmath>
#include <iterator>
#include <numbers>
#include <stdexcept>
#include <string>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/random.h"

namespace turboquant {
namespace {

void walsh_hadamard(float* x, int n) {
    for (int h = 1; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
}

// T: WHT over each run of pow2 values, then the DHT across runs. Symmetric and orthonormal.
void transform(std::span<float> x, int pow2, int odd, std::span<const float> hartley) {
    const float norm = 1 / std::sqrt(static_cast<float>(pow2));
    for (int l = 0; l < odd; ++l) walsh_hadamard(x.data() + l * pow2, pow2);
    for (int i = 0; i < pow2; ++i) {
        std::array<float, 9> column{};
        for (int l = 0; l < odd; ++l)
            for (int j = 0; j < odd; ++j) column[l] += hartley[l * odd + j] * x[j * pow2 + i];
        for (int l = 0; l < odd; ++l) x[l * pow2 + i] = column[l] * norm;
    }
}

void multiply(std::span<float> x, std::span<const float> signs) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= signs[i];
}

[[noreturn]] void throw_unsupported(int head_dim) {
    std::string known;
    for (int d : kHeadDims) known.append(" ").append(std::to_string(d));
    throw std::invalid_argument("rotation: head_dim " + std::to_string(head_dim) + " is not supported; supported:" + known);
}

void check_size(std::span<const float> x, int head_dim) {
    if (x.size() != static_cast<std::size_t>(head_dim))
        throw std::invalid_argument("rotation: got " + std::to_string(x.size()) + " values for head_dim " + std::to_string(head_dim));
}

}  // namespace

Rotation::Rotation(int head_dim, std::uint64_t seed) : head_dim_(head_dim), pow2_(1), odd_(head_dim) {
    if (!head_dim_supported(head_dim)) throw_unsupported(head_dim);
    for (; odd_ % 2 == 0; odd_ /= 2) pow2_ *= 2;
    for (int j = 0; j < odd_; ++j)
        for (int l = 0; l < odd_; ++l) {
            const double angle = 2 * std::numbers::pi * (j * l % odd_) / odd_;
            hartley_.push_back(static_cast<float>((std::cos(angle) + std::sin(angle)) / std::sqrt(static_cast<double>(odd_))));
        }
    SplitMix64 random(seed ^ static_cast<std::uint64_t>(head_dim) << 32);
    for (std::vector<float>* signs : {&signs_in_, &signs_out_})
        for (int i = 0; i < head_dim; ++i) signs->push_back(random.bits() >> 63 ? 1.f : -1.f);
}

void Rotation::forward(std::span<float> x) const {
    check_size(x, head_dim_);
    multiply(x, signs_in_);
    transform(x, pow2_, odd_, hartley_);
    multiply(x, signs_out_);
}

void Rotation::inverse(std::span<float> x) const {
    check_size(x, head_dim_);
    multiply(x, signs_out_);
    transform(x, pow2_, odd_, hartley_);
    multiply(x, signs_in_);
}

const Rotation& rotation_for(int head_dim) {
    static const std::vector<Rotation> all(std::begin(kHeadDims), std::end(kHeadDims));
    for (const Rotation& r : all)
        if (r.head_dim() == head_dim) return r;
    throw_unsupported(head_dim);
}

}  // namespace turboquant
