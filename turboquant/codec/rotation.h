// Randomized Hadamard rotation, orthonormal, for vectors of every size without padding.
//
// Source: TurboQuant, arXiv:2504.19874, sec. 3.1 (random rotation), realised as sign flips, a fast transform, sign flips.
// head_dim = 2^k * m with m odd: the transform is WHT(2^k) (x) DHT(m), the Walsh-Hadamard transform of order 2^k composed with the discrete
// Hartley transform of order m (entries (cos + sin)(2 pi j l / m)/sqrt(m): orthogonal and symmetric, so it is its own inverse, like the
// WHT). For a power of two this is the plain WHT.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

/// y = S2 * T * S1 * x, with S1, S2 diagonal +-1 and T the symmetric orthonormal transform above. Immutable after construction.
class Rotation {
  public:
    /// Any size from 1; the cost is head_dim * (k + m). Signs are drawn from a fixed generator seeded with (seed, head_dim): the same
    /// everywhere, on every machine. Throws std::invalid_argument if head_dim is not positive.
    explicit Rotation(int head_dim, std::uint64_t seed = kDefaultSeed);

    int head_dim() const { return head_dim_; }
    int pow2() const { return pow2_; }                               ///< 2^k
    int odd() const { return odd_; }                                 ///< m
    std::span<const float> signs_in() const { return signs_in_; }    ///< S1, head_dim entries +-1
    std::span<const float> signs_out() const { return signs_out_; }  ///< S2
    std::span<const float> hartley() const { return hartley_; }      ///< DHT(m), row-major m*m, scaled by 1/sqrt(m); {1} for m = 1

    /// In place; x has head_dim values. Index layout for m > 1: x[l*pow2 + i], l < m, i < pow2 (the WHT runs over i, the DHT over l).
    void forward(std::span<float> x) const;
    void inverse(std::span<float> x) const;

    /// Inverse of kLanes vectors at once, the columns of x: x[i*kLanes + lane], i < head_dim.
    void inverse_columns(std::span<float> x) const;
    static constexpr int kLanes = 64;

    static constexpr std::uint64_t kDefaultSeed = 42;

  private:
    int head_dim_, pow2_, odd_;
    std::vector<float> signs_in_, signs_out_, hartley_;
};

/// Shared instance for a head size (constructed once, thread-safe). Throws std::invalid_argument if head_dim is not in kHeadDims.
const Rotation& rotation_for(int head_dim);
/// Shared instance for a part of a head, of any size (constructed once, thread-safe). Throws as the constructor.
const Rotation& part_rotation_for(int n);

}  // namespace turboquant
