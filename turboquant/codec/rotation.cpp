#include "turboquant/codec/rotation.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <mutex>
#include <numbers>
#include <stdexcept>
#include <string>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/random.h"

namespace turboquant {
namespace {

// All of this on `lanes` interleaved vectors: value i of vector l is x[i*lanes + l].
template <int lanes>
void walsh_hadamard(float* x, int n) {
    for (int h = 1; h < n; h *= 2)
        for (int i = 0; i < n; i += 2 * h)
            for (int j = i * lanes; j < (i + h) * lanes; ++j) {
                const float a = x[j], b = x[j + h * lanes];
                x[j] = a + b;
                x[j + h * lanes] = a - b;
            }
}

// T: WHT over each run of pow2 values, then the DHT across runs. Symmetric and orthonormal.
template <int lanes>
void transform(std::span<float> x, int pow2, int odd, std::span<const float> hartley) {
    const float norm = 1 / std::sqrt(static_cast<float>(pow2));
    for (int l = 0; l < odd; ++l) walsh_hadamard<lanes>(x.data() + l * pow2 * lanes, pow2);
    std::vector<float> column(static_cast<std::size_t>(odd) * lanes);
    for (int i = 0; i < pow2; ++i) {
        std::fill(column.begin(), column.end(), 0.0f);
        for (int l = 0; l < odd; ++l)
            for (int j = 0; j < odd; ++j) {
                const float* from = x.data() + static_cast<std::size_t>(j * pow2 + i) * lanes;
                for (int k = 0; k < lanes; ++k) column[l * lanes + k] += hartley[l * odd + j] * from[k];
            }
        for (int l = 0; l < odd; ++l)
            for (int k = 0; k < lanes; ++k) x[static_cast<std::size_t>(l * pow2 + i) * lanes + k] = column[l * lanes + k] * norm;
    }
}

template <int lanes>
void multiply(std::span<float> x, std::span<const float> signs) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= signs[i / lanes];
}

template <int lanes>
void rotate(std::span<float> x, const Rotation& r, bool inverse) {
    multiply<lanes>(x, inverse ? r.signs_out() : r.signs_in());
    transform<lanes>(x, r.pow2(), r.odd(), r.hartley());
    multiply<lanes>(x, inverse ? r.signs_in() : r.signs_out());
}

[[noreturn]] void throw_unsupported(int head_dim) {
    std::string known;
    for (int d : kHeadDims) known.append(" ").append(std::to_string(d));
    throw std::invalid_argument("rotation: head_dim " + std::to_string(head_dim) + " is not supported; supported:" + known);
}

void check_size(std::span<const float> x, int head_dim, int lanes) {
    if (x.size() != static_cast<std::size_t>(head_dim) * lanes)
        throw std::invalid_argument("rotation: got " + std::to_string(x.size()) + " values for " + std::to_string(lanes) + " x " +
                                    std::to_string(head_dim));
}

}  // namespace

Rotation::Rotation(int head_dim, std::uint64_t seed) : head_dim_(head_dim), pow2_(1), odd_(head_dim) {
    if (head_dim < 1) throw_unsupported(head_dim);
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
    check_size(x, head_dim_, 1);
    rotate<1>(x, *this, false);
}

void Rotation::inverse(std::span<float> x) const {
    check_size(x, head_dim_, 1);
    rotate<1>(x, *this, true);
}

void Rotation::inverse_columns(std::span<float> x) const {
    check_size(x, head_dim_, kLanes);
    rotate<kLanes>(x, *this, true);
}

const Rotation& rotation_for(int head_dim) {
    static const std::vector<Rotation> all(std::begin(kHeadDims), std::end(kHeadDims));
    for (const Rotation& r : all)
        if (r.head_dim() == head_dim) return r;
    throw_unsupported(head_dim);
}

const Rotation& part_rotation_for(int n) {
    static std::mutex mutex;
    static std::map<int, Rotation> all;
    const std::lock_guard lock(mutex);
    return all.try_emplace(n, n).first->second;
}

}  // namespace turboquant
