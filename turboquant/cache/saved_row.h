// What rides in a saved key row. Rows are saved as plain fp16 in the model's space, so that any format, llama.cpp's own f16 cache too, can read
// them back. What fp16 values cannot say goes into the lowest mantissa bits (one unit in the last place at most):
//   values 0..63   32 bits of position, 32 bits of check word (two words: offset still being measured / frozen)
//   values 64..    if frozen: a piece of the frozen offset mu (fp16), piece number = position % mu_pieces(n_embd)
// so a row says where it stood and a run of rows says which offset was removed: restoring is lossless in another process, too.
// Rows shorter than 64 values carry nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace turboquant {

struct RowTag {
    std::int32_t pos = -1;
    bool frozen = false;
};

/// Rows that together hold mu: 16*n_embd bits in pieces of n_embd - 64; 0 if a row has no room for a piece.
int mu_pieces(std::size_t n_embd);

/// Writes the tag, and for frozen tags the piece of mu (n_embd fp16 values), into the row. Nothing if pos < 0 or the row is too short.
void tag_row(std::span<std::uint16_t> row, RowTag tag, std::span<const std::uint16_t> mu);
/// The tag of a row; pos = -1 if it has none.
RowTag read_tag(std::span<const std::uint16_t> row);

/// Collects the pieces of mu from tagged rows.
class MuPieces {
  public:
    explicit MuPieces(std::size_t n_embd) : mu_(n_embd), seen_(mu_pieces(n_embd)) {}
    void add(std::span<const std::uint16_t> row, RowTag tag);
    /// mu in fp16 once every piece was seen.
    std::optional<std::vector<std::uint16_t>> complete() const;

  private:
    std::vector<std::uint16_t> mu_;
    std::vector<bool> seen_;
};

}  // namespace turboquant
