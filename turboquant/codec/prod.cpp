#include "turboquant/codec/prod.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numbers>
#include <stdexcept>
#include <utility>

#include "turboquant/codec/random.h"

namespace turboquant {
namespace {

const Codebook& mse_codebook(int bits, int head_dim) {
    if (bits < 2 || bits > 5) throw std::invalid_argument("prod quantizer: bits must be 2 to 5, not " + std::to_string(bits));
    return codebook_for(bits - 1, head_dim);
}

}  // namespace

ProdQuantizer::ProdQuantizer(int bits, int head_dim, std::uint64_t seed)
    : head_dim_(head_dim),
      rotation_(&rotation_for(head_dim)),
      codebook_(&mse_codebook(bits, head_dim)),
      sketch_(static_cast<std::size_t>(head_dim) * head_dim) {
    SplitMix64 random(seed);
    for (float& s : sketch_) s = static_cast<float>(random.normal());
}

ProdVector ProdQuantizer::quantize(std::span<const float> x) const {
    ProdVector v{quantize_mse(*rotation_, *codebook_, NormMode::plain, x), {}, 0};
    std::vector<float> r(x.begin(), x.end());
    rotation_->forward(r);
    double norm2 = 0;
    for (int i = 0; i < head_dim_; ++i) {
        r[i] -= codebook_->centroids[v.mse.codes[i]] * v.mse.scale;
        norm2 += static_cast<double>(r[i]) * r[i];
    }
    for (int j = 0; j < head_dim_; ++j) {
        double s = 0;
        for (int i = 0; i < head_dim_; ++i) s += static_cast<double>(sketch_[j * head_dim_ + i]) * r[i];
        v.signs.push_back(s >= 0);
    }
    v.residual_norm = from_half(to_half(static_cast<float>(std::min(std::sqrt(norm2), 65504.0))));
    return v;
}

void ProdQuantizer::dequantize(const ProdVector& v, std::span<float> x) const {
    const auto n = static_cast<std::size_t>(head_dim_);
    if (x.size() != n) throw std::invalid_argument("prod quantizer: x must hold head_dim values");
    if (v.mse.codes.size() != n || v.signs.size() != n)
        throw std::invalid_argument("prod quantizer: the vector was not made for head_dim " + std::to_string(head_dim_));
    std::vector<double> sketched(n);
    for (std::size_t j = 0; j < n; ++j)
        for (std::size_t i = 0; i < n; ++i) sketched[i] += v.signs[j] ? sketch_[j * n + i] : -sketch_[j * n + i];
    const double gain = static_cast<double>(sketch_gain()) * v.residual_norm;
    for (std::size_t i = 0; i < n; ++i) {
        if (v.mse.codes[i] >= codebook_->centroids.size()) throw std::invalid_argument("prod quantizer: code out of range");
        x[i] = static_cast<float>(codebook_->centroids[v.mse.codes[i]] * v.mse.scale + gain * sketched[i]);
    }
    rotation_->inverse(x);
}

float ProdQuantizer::sketch_gain() const { return static_cast<float>(std::sqrt(std::numbers::pi / 2) / head_dim_); }

const ProdQuantizer& prod_quantizer_for(int bits, int head_dim) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, ProdQuantizer> all;
    const std::lock_guard lock(mutex);
    return all.try_emplace({bits, head_dim}, bits, head_dim).first->second;
}

}  // namespace turboquant
