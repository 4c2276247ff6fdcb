#include "turboquant/cache/saved_row.h"

#include <algorithm>

namespace turboquant {
namespace {

constexpr std::size_t kTagBits = 64;
constexpr std::uint32_t kCheck[2] = {0x54517631u, 0x4d756672u};  // measuring, frozen

constexpr std::uint32_t check_word(std::uint32_t pos, bool frozen) { return (pos * 0x9E3779B1u) ^ kCheck[frozen]; }

/// Calls f(bit of mu, value of the row) for the bits of piece `piece`.
template <class F>
void for_piece(std::size_t n_embd, std::size_t piece, F&& f) {
    const std::size_t per_row = n_embd - kTagBits, first = piece * per_row, end = std::min(first + per_row, 16 * n_embd);
    for (std::size_t bit = first; bit < end; bit++) f(bit, kTagBits + bit - first);
}

}  // namespace

int mu_pieces(std::size_t n_embd) {
    return n_embd > kTagBits ? static_cast<int>((16 * n_embd + n_embd - kTagBits - 1) / (n_embd - kTagBits)) : 0;
}

void tag_row(std::span<std::uint16_t> row, RowTag tag, std::span<const std::uint16_t> mu) {
    if (row.size() < kTagBits || tag.pos < 0) return;
    const auto put = [&](std::size_t i, unsigned bit) { row[i] = static_cast<std::uint16_t>((row[i] & ~1u) | bit); };
    const auto pos = static_cast<std::uint32_t>(tag.pos);
    const std::uint64_t bits = pos | static_cast<std::uint64_t>(check_word(pos, tag.frozen)) << 32;
    for (std::size_t i = 0; i < kTagBits; i++) put(i, bits >> i & 1);
    if (const int pieces = mu_pieces(row.size()); tag.frozen && pieces)
        for_piece(row.size(), pos % pieces, [&](std::size_t bit, std::size_t i) { put(i, mu[bit / 16] >> bit % 16 & 1); });
}

RowTag read_tag(std::span<const std::uint16_t> row) {
    if (row.size() < kTagBits) return {};
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < kTagBits; i++) bits |= static_cast<std::uint64_t>(row[i] & 1) << i;
    const auto pos = static_cast<std::uint32_t>(bits);
    for (const bool frozen : {false, true})
        if (static_cast<std::uint32_t>(bits >> 32) == check_word(pos, frozen) && pos <= 0x7fffffffu) return {static_cast<std::int32_t>(pos), frozen};
    return {};
}

void MuPieces::add(std::span<const std::uint16_t> row, RowTag tag) {
    if (tag.pos < 0 || !tag.frozen || seen_.empty()) return;
    const std::size_t piece = static_cast<std::size_t>(tag.pos) % seen_.size();
    if (seen_[piece]) return;
    seen_[piece] = true;
    for_piece(mu_.size(), piece, [&](std::size_t bit, std::size_t i) { mu_[bit / 16] |= static_cast<std::uint16_t>((row[i] & 1) << bit % 16); });
}

std::optional<std::vector<std::uint16_t>> MuPieces::complete() const {
    if (seen_.empty() || std::find(seen_.begin(), seen_.end(), false) != seen_.end()) return std::nullopt;
    return mu_;
}

}  // namespace turboquant
