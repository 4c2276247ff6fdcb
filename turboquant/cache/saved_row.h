// The bytes of a row in llama.cpp's state (saved state, slots, llama-server's prompt cache). Packer: saved_rows.h.
//
// llama.cpp reserves 2*n_embd bytes a row, as for fp16. Four kinds of row fill them (RowKind, snapshot.h):
//   codes      "packed": what is stored, bit for bit. Begins with two fp16 NaNs that no fp16 cache holds (a row with a NaN is refused when
//              written): if a foreign f16 cache loads it, attention over it is NaN, so it fails visibly instead of computing garbage
//   measuring  fp16 keys in the model's space; the position rides in the last mantissa bits (tag_keys)
//   exact      fp16 keys, tagged with position and hash of their sequence's offset (tag_exact_keys)
//   plain      fp16 values in the model's space, as llama.cpp's own f16 cache and our `raw` write them
//
// Packed row, little-endian: u16 0x7e54; u8 check, u8 0x7e; u8 version, u8 codec (of the first head), u8 head_dim / 16, u8 check (high
// byte; of these fields and the next ones); i32 position (-1: unknown); u32 hash of the removed offset mu (0: none); in versions 2 (keys
// with scaled channels) and 3 u32 hash of the scales (0: none); in version 3 (heads of different formats) u8 codec per head; then
// row_bytes(codec, head_dim) bytes per head (codec/tile.h); then a piece of mu's fp16 values, in what is left: number position % n_pieces
// in versions 1 to 3. Versions 4 to 6 are the same rows with the number of the piece in the highest byte of the position: the rows of one
// offset carry its pieces in turn, in the order in which they are saved, so that any n_pieces rows in a row have them all.
// Versions 7 to 12 are 1 to 6 of a row in a window of residuals: behind the codes stand residual_bytes(head_dim) per head
// (codec/residual.h); the pieces of mu are the smaller for it, and more.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "turboquant/codec/tile.h"
#include "turboquant/spec/head_codecs.h"

namespace turboquant {

/// How a row is divided: bytes of the header, of codes, of residuals, of one piece of mu; the number of pieces.
struct RowPlaces {
    std::size_t header = 0, codes = 0, residual = 0, piece = 0, n_pieces = 0;

    std::size_t mu() const { return header + codes + residual; }
};

struct PackedHeader {
    HeadCodecs codecs = CodecId::turbo4;
    int head_dim = 0;
    std::int32_t pos = -1;
    std::uint32_t mu_hash = 0;
    std::uint32_t scale_hash = 0;  ///< of the scales of the key channels (KeyOffset); 0: not scaled
    /// Number of the piece of mu, taken modulo their number when packed; -1: the position's (as 0.1.0 chose it).
    int piece = -1;
    bool residual = false;  ///< one comes with the codes
    RowPlaces places = {};  ///< of a row that was read; row_places() where many rows are packed; empty: worked out for each row

    std::size_t head_bytes(int head) const { return row_bytes(codecs.of(head), head_dim); }
};

/// How rows of n_embd values with this header are divided: depends on n_embd, formats, head size, scales and `residual`.
RowPlaces row_places(std::size_t n_embd, const PackedHeader& header);

/// FNV-1a of the fp16 values, never 0.
std::uint32_t hash_mu(std::span<const std::uint16_t> mu);

/// Writes a packed row but for the codes; returns where the heads' codes go (n_head * row_bytes). `mu` is empty if no offset was removed.
/// The row has n_embd values; every rotated codec leaves room for the header.
std::span<std::uint8_t> pack_row(std::span<std::uint16_t> row, const PackedHeader& header, std::span<const std::uint16_t> mu);
/// The header of a packed row, or nullopt if it is not one (or is one that cannot have been written for this row size).
std::optional<PackedHeader> packed_header(std::span<const std::uint16_t> row);
/// The same for one row after the other: false if it is none, and `header` is as it was. Quick if `header` is that of another row of this
/// size and of the same formats and scales.
bool next_packed_header(std::span<const std::uint16_t> row, PackedHeader& header);
/// The heads' codes of a packed row.
std::span<const std::uint8_t> packed_codes(std::span<const std::uint16_t> row, const PackedHeader& header);

/// The heads' residuals of a packed row; empty if it has none.
std::span<const std::uint8_t> packed_residual(std::span<const std::uint16_t> row, const PackedHeader& header);
std::span<std::uint8_t> packed_residual(std::span<std::uint16_t> row, const PackedHeader& header);

/// Collects the pieces of one mu from packed rows.
class MuPieces {
  public:
    explicit MuPieces(std::size_t n_embd) : mu_(n_embd) {}
    void add(std::span<const std::uint16_t> row, const PackedHeader& header);
    /// mu in fp16 once every piece was seen and the hash fits.
    std::optional<std::vector<std::uint16_t>> complete() const;

  private:
    std::vector<std::uint16_t> mu_;
    std::vector<bool> seen_;  ///< by byte: rows with and without a residual have pieces of different sizes
    std::uint32_t hash_ = 0;
};

struct KeyTag {
    std::int32_t pos = -1;
    int offset_id = 0;          ///< tells sequences of one saved state apart
    std::uint32_t mu_hash = 0;  ///< of exact rows: then offset_id means nothing
};
/// Values of a row that tags change, in the last mantissa bit.
inline constexpr std::size_t kTagValues = 96;
/// Puts a position and an offset id (< 64) into the last mantissa bits of the first 64 values of an fp16 row (32 bits, and 32 of check):
/// one unit in the last place at most. Nothing if the row is shorter or pos < 0.
void tag_keys(std::span<std::uint16_t> row, std::int32_t pos, int offset_id);
/// Likewise of the first 96 values: position, check, hash of the removed offset. Needs kTagValues values and pos >= 0.
void tag_exact_keys(std::span<std::uint16_t> row, std::int32_t pos, std::uint32_t mu_hash);
/// Clears the bits that a tag would take: keys with their tag cleared are the same before saving and after restoring.
void clear_tag(std::span<std::uint16_t> row);
/// The tag found in an fp16 row; pos = -1 if there is none.
KeyTag read_tag(std::span<const std::uint16_t> row);

}  // namespace turboquant
