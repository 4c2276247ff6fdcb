// Token position of every cell, shared by all layers of one cache.
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
    std::int32_t at(std::int64_t row) const { return pos_[row]; }  ///< row = stream * n_cells + cell
    void set(std::int64_t row, std::int32_t pos) { pos_[row] = pos; }
    const std::int32_t* stream(std::int64_t s) const { return pos_.data() + s * n_cells_; }
    void copy_stream(std::int64_t src, std::int64_t dst);
    void clear();

    /// A context shift arrives once per layer, but moves the shared positions once: `generation` counts the shifts a layer has seen, and
    /// only the first layer to see a new one moves the positions. shift[row] is added where a position is known.
    void shift(std::span<const std::int32_t> shift, std::uint64_t& generation);

    /// The layer whose RoPE input sets the positions (the first that has one: the input may be gone when later layers run), or null.
    const void* setter = nullptr;

  private:
    std::int64_t n_cells_;
    std::vector<std::int32_t> pos_;
    std::uint64_t generation_ = 0;
};

}  // namespace turboquant
