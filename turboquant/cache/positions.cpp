#include "turboquant/cache/positions.h"

#include <algorithm>

namespace turboquant {
namespace {

constexpr std::size_t kCarrier = 64;
constexpr std::uint32_t check_word(std::uint32_t pos) { return (pos * 0x9E3779B1u) ^ 0x54517631u; }

}  // namespace

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

void embed_position(std::span<std::uint16_t> row, std::int32_t pos) {
    if (row.size() < kCarrier || pos < 0) return;
    const std::uint64_t bits = static_cast<std::uint32_t>(pos) | static_cast<std::uint64_t>(check_word(static_cast<std::uint32_t>(pos))) << 32;
    for (std::size_t i = 0; i < kCarrier; i++) row[i] = static_cast<std::uint16_t>((row[i] & ~1u) | (bits >> i & 1));
}

std::int32_t extract_position(std::span<const std::uint16_t> row) {
    if (row.size() < kCarrier) return -1;
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < kCarrier; i++) bits |= static_cast<std::uint64_t>(row[i] & 1) << i;
    const auto pos = static_cast<std::uint32_t>(bits);
    return static_cast<std::uint32_t>(bits >> 32) == check_word(pos) ? static_cast<std::int32_t>(pos) : -1;
}

}  // namespace turboquant
