// Encoder and decoder for the turbo2/3/4 block layouts in circulation in forks of llama.cpp (group 128, block 128).
// These are for exchange with other implementations only: the cache uses tiles (tile.h). Layouts, sign vectors and tables: docs/formats.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace turboquant::compat {

/// Blocks of 128 values, byte-packed: fp16 corrected norm first.
enum class Block : std::uint8_t {
    turbo2,        ///< 34 bytes: norm, qs[32]
    turbo3,        ///< 50 bytes: norm, qs[32], signs[16]
    turbo4,        ///< 66 bytes: norm, qs[64]; since June 2026, corrected Lloyd-Max table
    turbo4_rnorm,  ///< 68 bytes: norm, rnorm (= 0), qs[64]; March-June 2026
};

/// Which 4-bit table was used: nothing in the bytes says so. `lloyd`: converged Lloyd-Max levels; ignored by turbo2 and turbo3.
enum class Table4 : std::uint8_t { old, lloyd };

inline constexpr int kBlockValues = 128;

/// Bytes of one block, see the enumeration.
std::size_t block_bytes(Block b);

/// x: 128 values -> block_bytes(b) bytes. float32 arithmetic in the order that makes the bytes reproducible (no FMA contraction).
/// Throws std::invalid_argument if `out` has not exactly block_bytes(b) bytes, std::domain_error if |x|^2 is not a finite float.
/// A norm beyond fp16 is stored as 65504.
void encode(Block b, std::span<const float, kBlockValues> x, std::span<std::uint8_t> out, Table4 table = Table4::old);

/// Decodes to the *rotated* domain (as the forks do) or, with `unrotate`, back to the input's. Any bytes decode; rnorm is not read.
/// Throws std::invalid_argument if `in` has not exactly block_bytes(b) bytes.
void decode(Block b, std::span<const std::uint8_t> in, std::span<float, kBlockValues> y, bool unrotate, Table4 table = Table4::old);

}  // namespace turboquant::compat
