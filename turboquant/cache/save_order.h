// The order in which the rows of one saved state leave the cache: what a saved row says of its place (saved_row.h) depends on the rows that
// are saved alone, not on the cells they lie in, nor on their positions, which may repeat (M-RoPE) or have gaps.
#pragma once

#include <array>
#include <cstdint>

namespace turboquant {

/// llama.cpp saves a sequence range of cells by range of cells, tensor by tensor; whoever saves rows of a tensor calls begin() for every
/// range. Ranges of one tensor that go forward belong to one state.
class SaveOrder {
  public:
    static constexpr int kMaxOffsets = 64;  ///< offset ids

    void begin(const void* tensor, std::int64_t first_row) {
        if (tensor != tensor_ || first_row < begun_ || first_row < last_row_) *this = {};
        tensor_ = tensor, begun_ = first_row;
    }

    /// Of the offset of a row that names it: offsets are numbered as they appear.
    int name(int offset_id) {
        std::int8_t& name = names_[static_cast<std::size_t>(offset_id)];
        if (name == 0) name = static_cast<std::int8_t>(++n_names_);
        return name - 1;
    }
    /// Of a row that carries a piece of its offset, among the rows that do. Rows in ascending order; the last one may be asked for again
    /// (it is saved in parts).
    int number(std::int64_t row, int offset_id) {
        std::int32_t& count = counts_[static_cast<std::size_t>(offset_id)];
        if (row != last_row_ || count == 0) count++;
        last_row_ = row;
        return count - 1;
    }

  private:
    const void* tensor_ = nullptr;
    std::int64_t begun_ = -1, last_row_ = -1;
    int n_names_ = 0;
    std::array<std::int8_t, kMaxOffsets> names_{};  // plus one
    std::array<std::int32_t, kMaxOffsets> counts_{};
};

}  // namespace turboquant
