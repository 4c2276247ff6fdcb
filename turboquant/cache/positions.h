// Token position of every cell, shared by all layers of one cache, and the way positions travel through saved state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

/// Positions of the cells of one cache (all its layers use the same cells). -1: unknown or never written.
class CellPositions {
  public:
    CellPositions(std::int64_t n_cells, std::int64_t n_streams) : n_cells_(n_cells), pos_(n_cells * n_streams, -1) {}

    std::int64_t n_cells() const { return n_cells_; }
    std::size_t size() const { return pos_.size(); }
    std::size_t bytes() const { return pos_.size() * sizeof(std::int32_t); }
    std::int32_t at(std::int64_t row) const { return pos_[row]; }   ///< row = stream * n_cells + cell
    void set(std::int64_t row, std::int32_t pos) { pos_[row] = pos; }
    const std::int32_t* stream(std::int64_t s) const { return pos_.data() + s * n_cells_; }
    void copy_stream(std::int64_t src, std::int64_t dst);
    void clear();

    /// A context shift arrives once per layer, but moves the shared positions once: `generation` counts the shifts a layer has seen, and
    /// only the first layer to see a new one moves the positions. shift[row] is added where a position is known.
    void shift(std::span<const std::int32_t> shift, std::uint64_t& generation);
    std::uint64_t generation() const { return generation_; }

  private:
    std::int64_t n_cells_;
    std::vector<std::int32_t> pos_;
    std::uint64_t generation_ = 0;
};

/// A saved row is plain fp16 in the model's space, so it can be read back by any format, by llama.cpp's own f16 cache too. The cell's position
/// rides in the lowest mantissa bits of its first 64 values (32 bits of position, 32 of check): one unit in the last place of fp16 at most.
/// Rows shorter than 64 values carry none.
void embed_position(std::span<std::uint16_t> row, std::int32_t pos);
/// The position found in a row, or -1 (check bits do not fit: the row was not saved by us).
std::int32_t extract_position(std::span<const std::uint16_t> row);

}  // namespace turboquant
