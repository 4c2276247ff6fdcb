// Rotations by a position times many frequencies, from a small constant table by angle addition: a position is written in base 64, and its
// rotation is the product of one row per digit. The table does not grow with the context; entries are exact to float rounding.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

constexpr int kTurnRadix = 64, kTurnDigits = 4;  ///< positions count modulo 64^4 = 16.8 million
/// Frequencies in a row, rounded up to whole vectors; those added are zero.
constexpr int turn_width(int n_freq) { return (n_freq + 15) / 16 * 16; }

/// [kTurnDigits][kTurnRadix][2*turn_width(n)]: row r of digit k holds cos(r 64^k w_i), i < n, then sin(r 64^k w_i), with w_i =
/// frequencies[i] in radians per position.
std::vector<float> make_turns(std::span<const double> frequencies);

/// cos(pos w_i).. and, from turn_width(n_freq) on, sin(pos w_i).. of a position >= 0, within 4e-7. `row`: 2*turn_width(n_freq) floats.
void turn_row(const float* turns, int n_freq, std::int32_t pos, float* row);

/// Value i of R(p) mu for a head of n dims. mu: its n values, then the n of mu_perp, mu turned by 90 degrees pair by pair; turn: n cosines
/// of position p, then n sines, as they apply to each dim. The definition of what the encoders take from keys and of what reading gives back.
inline float turned(const float* mu, const float* turn, int n, int i) { return mu[i] * turn[i] + mu[n + i] * turn[n + i]; }

}  // namespace turboquant
