// Trellis-coded quantization (TCQ): the error of a good vector quantizer, decoded by a table look-up per value.
//
// Source: Ungerboeck 1982 (codes), Marcellin and Fischer 1990 (quantization). A value of `bits` bits is one of 2^(bits+1) levels, twice as
// many as its code could name. The levels, ascending, belong to the subsets D0 D1 D2 D3 D0 D1 ...; which subset a value may use depends on
// its own trellis bit and on those of the values before it. The vector is a ring: before its first value comes its last.
//
//   code of value i:    point | u_i << (bits-1)     u_i: trellis bit;  point: which level of the subset, bits-1 bits
//   window of value i:  w_i = u_i | u_(i-1) << 1 | ... | u_(i-memory) << memory
//   subset of value i:  2*z1 + z0,  z1 = parity(w_i & h0),  z0 = parity(w_i & h1)
//   level of value i:   4*point + subset
//
// This is the feed-forward form of Ungerboeck's systematic code (h1*z1 + h0*z0 = 0 holds as polynomials), so decoding has no state to
// carry: z1 and z0 of all values are XORs of shifted bit planes. In tiles (tile.h) the trellis bits are a 1-bit plane of their own.
// "The previous dim" lies there
//   keys:    one bit lower in its group of 4 (a 64-bit word is 16 slots x 4 dims); for the lowest, at the top of the same group of the
//            unit before; before the first unit comes the last;
//   values:  4 bits lower (a word is 16 dims x 4 slots); for the first dim of a word, at the top of the word before; before the first word
//            of 4 slots comes their last.
//
// Encoding is a Viterbi search over 2^memory states. It is specified in integers, so that vectorized encoders give the same codes:
//   distance of y to subset k:  a_k = min |y - level|;   cost_k = min(255, round(cost_scale * (a_k^2 - min a^2)))
//   metrics:  8 bits, saturating; after every 8th value of a pass the least metric is subtracted from all
//   ties:     of two equal ways into a state the one whose oldest bit is 0 wins; of equal final states the lowest
//   pass 1:   from all states alike, over the 64 values before and after the joint: its best path names the state at the joint
//   pass 2:   from that state back to it, once around: the trellis bits.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

/// The code in use: 128 states.
inline constexpr int kTrellisMemory = 7;
inline constexpr int kTrellisMinBits = 1, kTrellisMaxBits = 5;
inline constexpr std::uint32_t kTrellisH0 = 0235, kTrellisH1 = 0126;
inline constexpr int kTrellisOverlap = 64;  ///< values on either side of the ring's joint in pass 1
inline constexpr int kTrellisNormalizeEvery = 8;

/// Levels and code of one (bits, head_dim). Immutable.
struct TrellisCodebook {
    int bits = 0;
    int head_dim = 0;
    int memory = 0;                ///< the code has 2^memory states
    std::uint32_t h0 = 0, h1 = 0;  ///< Ungerboeck's parity-check polynomials, bit k = D^k; h1 has neither its lowest nor its highest bit
    std::vector<std::int8_t> i8;   ///< 2^(bits+1) levels, ascending, symmetric
    float i8_step = 0;             ///< level = i8 * i8_step, for coordinates of a *unit* vector (rms 1/sqrt(head_dim))
    std::vector<float> centroids;  ///< i8 * i8_step
    float cost_scale = 0;          ///< 8 units of cost per squared distance of the two innermost levels

    /// Subset 0..3 of a value from its window of trellis bits.
    std::uint32_t subset(std::uint32_t window) const {
        return static_cast<std::uint32_t>(2 * (std::popcount(window & h0) & 1) + (std::popcount(window & h1) & 1));
    }
};

/// Ungerboeck's code of 2^memory states with the given levels (2^(bits+1) ascending values in units of sigma = i8 * step).
/// Throws std::invalid_argument unless bits is 1..5, memory 3..8 and the number of levels fits.
TrellisCodebook make_trellis(int bits, int head_dim, int memory, std::vector<std::int8_t> i8, float step);

/// Shared instance with the trained levels (128 states), thread-safe. bits 1..5; throws std::invalid_argument outside.
const TrellisCodebook& trellis_for(int bits, int head_dim);

/// Codes of the rotated unit vector y (head_dim values): the Viterbi search above. `codes` has head_dim entries.
void trellis_encode(const TrellisCodebook& book, std::span<const float> y, std::span<std::uint8_t> codes);

/// Level index of every value: levels[i] = 4*point + subset, into i8 / centroids. Any codes are valid.
void trellis_levels(const TrellisCodebook& book, std::span<const std::uint8_t> codes, std::span<std::uint8_t> levels);

}  // namespace turboquant
