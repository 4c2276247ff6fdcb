#include "turboquant/cuda/fragment_order.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace turboquant::cuda {
namespace {

void check(const TileShape& shape, int slot) {
    if (!has_fragment_order(shape.codec))
        throw std::invalid_argument("fragment order: '" + std::string(codec_info(shape.codec).name) +
                                    "' has none; use a turbo or tcq format, or raw");
    if (!head_dim_supported(shape.head_dim))
        throw std::invalid_argument("fragment order: head_dim " + std::to_string(shape.head_dim) + " is not supported");
    if (slot < 0 || slot >= kTileKeys) throw std::invalid_argument("fragment order: slot " + std::to_string(slot) + " is not in 0..63");
}

struct Bit {
    std::size_t byte;
    int shift;
};

Bit bit_of(const TileShape& s, int slot, int dim, int bit) {
    const FragmentBit b = fragment_bit(s.codec, s.side, s.head_dim, slot, dim, bit);
    return {fragment_word_offset(fragment_words(s.codec, s.head_dim), b.lane, b.word) + static_cast<std::size_t>(b.shift / 8), b.shift % 8};
}

}  // namespace

std::uint32_t get_fragment_code(const TileShape& shape, const std::uint8_t* tile, int slot, int dim) {
    std::uint32_t stored = 0;
    for (int i = 0; i < codec_info(shape.codec).bits; ++i) {
        const Bit b = bit_of(shape, slot, dim, i);
        stored |= (tile[b.byte] >> b.shift & 1u) << i;
    }
    return code_of_fragment(shape.codec, stored);
}

void set_fragment_code(const TileShape& shape, std::uint8_t* tile, int slot, int dim, std::uint32_t code) {
    const std::uint32_t stored = fragment_code(shape.codec, code);
    for (int i = 0; i < codec_info(shape.codec).bits; ++i) {
        const Bit b = bit_of(shape, slot, dim, i);
        tile[b.byte] = static_cast<std::uint8_t>((tile[b.byte] & ~(1u << b.shift)) | (stored >> i & 1u) << b.shift);
    }
}

void fragment_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row) {
    check(shape, slot);
    const CodecInfo& info = codec_info(shape.codec);
    const auto bits = static_cast<std::size_t>(info.bits), n = shape.head_dim * bits / 8;
    std::fill_n(row, n, std::uint8_t{0});
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        const std::uint32_t code = get_fragment_code(shape, tile, slot, dim);
        for (std::size_t i = 0; i < bits; ++i)
            row[(dim * bits + i) / 8] |= static_cast<std::uint8_t>((code >> i & 1u) << (dim * bits + i) % 8);
    }
    if (info.rotated) std::copy_n(tile + fragment_scale_offset(shape, slot), 2, row + n);
}

void fragment_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row) {
    check(shape, slot);
    const CodecInfo& info = codec_info(shape.codec);
    const auto bits = static_cast<std::size_t>(info.bits), n = shape.head_dim * bits / 8;
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        std::uint32_t code = 0;
        for (std::size_t i = 0; i < bits; ++i) code |= (row[(dim * bits + i) / 8] >> (dim * bits + i) % 8 & 1u) << i;
        set_fragment_code(shape, tile, slot, dim, code);
    }
    if (info.rotated) std::copy_n(row + n, 2, tile + fragment_scale_offset(shape, slot));
}

}  // namespace turboquant::cuda
