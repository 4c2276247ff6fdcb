#include "turboquant/cache/positions.h"

#include <algorithm>

namespace turboquant {
void CellPositions::copy_stream(std::int64_t src, std::int64_t dst) {
    std::copy_n(pos_.begin() + src * n_cells_, n_cells_, pos_.begin() + dst * n_cells_);
}

void CellPositions::clear() { std::fill(pos_.begin(), pos_.end(), -1); }

void CellPositions::shift(std::span<const std::int32_t> shift, std::uint64_t& generation) {
    if (++generation <= generation_) return;
    generation_ = generation;
    for (std::size_t i = 0; i < std::min(pos_.size(), shift.size()); i++)
        if (pos_[i] >= 0) pos_[i] = std::max(pos_[i] + shift[i], 0);
}

}  // namespace turboquant
