// Random numbers that are the same on every machine: the standard library's distributions differ between implementations.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace turboquant {

/// SplitMix64 (Steele, Lea and Flood 2014), with a normal deviate by Box-Muller on top.
class SplitMix64 {
  public:
    explicit SplitMix64(std::uint64_t seed) : state_(seed) {}

    /// 64 uniform bits.
    std::uint64_t bits() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }

    /// Uniform in (0, 1).
    double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }

    /// N(0, 1).
    double normal() {
        const double radius = std::sqrt(-2 * std::log(uniform()));
        return radius * std::cos(2 * std::numbers::pi * uniform());
    }

  private:
    std::uint64_t state_;
};

}  // namespace turboquant
