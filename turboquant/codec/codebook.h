// Lloyd-Max codebooks for one coordinate of a random unit vector in R^head_dim.
//
// Source: TurboQuant, arXiv:2504.19874, sec. 3.1: after the rotation each coordinate follows the sphere marginal
//   f(t) ~ (1 - t^2)^((d-3)/2) on [-1, 1], close to N(0, 1/d); the codebook minimizes E[(t - Q(t))^2] (Lloyd 1957, Max 1960).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

/// A symmetric scalar codebook of 2^bits levels, ascending, solved to convergence. Immutable.
struct Codebook {
    int bits = 0;
    int head_dim = 0;
    std::vector<float> centroids;   ///< 2^bits values, ascending, for coordinates of a *unit* vector (rms about 1/sqrt(head_dim))
    std::vector<float> boundaries;  ///< 2^bits - 1 midpoints; a value equal to a boundary belongs to the upper cell
    double mse = 0;                 ///< expected squared error of a whole unit vector, head_dim * E[(t - Q(t))^2]
    double residual = 0;            ///< convergence: largest |centroid - mean of its cell| / rms of a coordinate, before rounding to float

    /// int8 image of the centroids (for i8 panels; bits <= 4): centroid ~ i8[k] * i8_step, |i8| <= 127. The step
    /// (max centroid / 100 to / 127) is the one with the least rounding error. Empty and 0 for bits > 4.
    std::vector<std::int8_t> i8;
    float i8_step = 0;

    /// Index of the cell of t: the number of boundaries <= t.
    std::uint32_t quantize(float t) const;
};

/// Solves the codebook for the sphere law. bits in 1..8, head_dim >= 8. Throws std::invalid_argument outside.
Codebook solve_codebook(int bits, int head_dim);

/// Solves for the Gaussian N(0,1) limit (centroids in units of sigma; mse per value): for checks against published tables.
Codebook solve_gaussian_codebook(int bits);

/// Shared instance (solved once, thread-safe). Throws as solve_codebook.
const Codebook& codebook_for(int bits, int head_dim);

}  // namespace turboquant
