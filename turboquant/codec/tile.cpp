#include "turboquant/codec/tile.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace turboquant {
namespace {

// A bit plane of `bits` per index: where index r (0..255) of a unit lies in it.
struct Place {
    std::size_t byte;
    int shift;
};

template <int bits>
Place place(std::size_t r) {
    if constexpr (bits == 8) return {r, 0};
    if constexpr (bits == 4) return {r / 128 * 64 + r % 64, static_cast<int>(r / 64 % 2 * 4)};
    if constexpr (bits == 2) return {r % 64, static_cast<int>(r / 64 * 2)};
    if constexpr (bits == 1) return {r / 8, static_cast<int>(r % 8)};
}

template <int bits>
std::uint32_t read(const std::uint8_t* plane, std::size_t r) {
    const Place p = place<bits>(r);
    return plane[p.byte] >> p.shift & ((1u << bits) - 1);
}

template <int bits>
void write(std::uint8_t* plane, std::size_t r, std::uint32_t v) {
    const Place p = place<bits>(r);
    const std::uint32_t mask = (1u << bits) - 1;
    plane[p.byte] = static_cast<std::uint8_t>((plane[p.byte] & ~(mask << p.shift)) | (v & mask) << p.shift);
}

constexpr int kUnit = 256;

// Bytes of a plane of `bits` per index in one unit.
constexpr std::size_t plane_bytes(int bits) { return kUnit / 8 * bits; }

void copy_half(std::uint8_t* to, const std::uint8_t* from) { std::copy_n(from, 2, to); }

void check(const TileShape& shape, int slot) {
    if (is_composite(shape.codec)) throw std::invalid_argument("tile: composite formats have no row form");
    if (!head_dim_supported(shape.head_dim))
        throw std::invalid_argument("tile: head_dim " + std::to_string(shape.head_dim) + " is not supported");
    if (slot < 0 || slot >= kTileKeys) throw std::invalid_argument("tile: slot " + std::to_string(slot) + " is not in 0..63");
}

}  // namespace

std::uint32_t get_code(CodecId codec, const std::uint8_t* codes, std::size_t index) {
    const std::uint8_t* unit = codes + index / kUnit * plane_bytes(codec_info(codec).bits);
    const std::size_t r = index % kUnit;
    switch (codec) {
        case CodecId::turbo2:
            return read<2>(unit, r);
        case CodecId::turbo3:
        case CodecId::tcq3:
            return read<2>(unit, r) | read<1>(unit + plane_bytes(2), r) << 2;
        case CodecId::turbo4:
            return read<4>(unit, r);
        case CodecId::turbo5:
            return read<4>(unit, r) | read<1>(unit + plane_bytes(4), r) << 4;
        case CodecId::turbo6:
            return read<4>(unit, r) | read<2>(unit + plane_bytes(4), r) << 4;
        case CodecId::tcq1:
            return read<1>(unit, r);
        case CodecId::tcq2:
            return read<1>(unit, r) | read<1>(unit + plane_bytes(1), r) << 1;
        case CodecId::tcq4:
            return read<2>(unit, r) | read<1>(unit + plane_bytes(2), r) << 2 | read<1>(unit + plane_bytes(3), r) << 3;
        case CodecId::tcq5:
            return read<2>(unit, r) | read<1>(unit + plane_bytes(2), r) << 2 | read<1>(unit + plane_bytes(3), r) << 3 |
                   read<1>(unit + plane_bytes(4), r) << 4;
        case CodecId::turbo8:
            return read<8>(unit, r);
        default:
            break;
    }
    throw std::invalid_argument("tile: this codec has no code indices");
}

void set_code(CodecId codec, std::uint8_t* codes, std::size_t index, std::uint32_t code) {
    std::uint8_t* unit = codes + index / kUnit * plane_bytes(codec_info(codec).bits);
    const std::size_t r = index % kUnit;
    switch (codec) {
        case CodecId::turbo2:
            return write<2>(unit, r, code);
        case CodecId::turbo3:
        case CodecId::tcq3:
            write<2>(unit, r, code);
            return write<1>(unit + plane_bytes(2), r, code >> 2);
        case CodecId::turbo4:
            return write<4>(unit, r, code);
        case CodecId::turbo5:
            write<4>(unit, r, code);
            return write<1>(unit + plane_bytes(4), r, code >> 4);
        case CodecId::turbo6:
            write<4>(unit, r, code);
            return write<2>(unit + plane_bytes(4), r, code >> 4);
        case CodecId::tcq1:
            return write<1>(unit, r, code);
        case CodecId::tcq2:
            write<1>(unit, r, code);
            return write<1>(unit + plane_bytes(1), r, code >> 1);
        case CodecId::tcq4:
            write<2>(unit, r, code);
            write<1>(unit + plane_bytes(2), r, code >> 2);
            return write<1>(unit + plane_bytes(3), r, code >> 3);
        case CodecId::tcq5:
            write<2>(unit, r, code);
            write<1>(unit + plane_bytes(2), r, code >> 2);
            write<1>(unit + plane_bytes(3), r, code >> 3);
            return write<1>(unit + plane_bytes(4), r, code >> 4);
        case CodecId::turbo8:
            return write<8>(unit, r, code);
        default:
            break;
    }
    throw std::invalid_argument("tile: this codec has no code indices");
}

void tile_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row) {
    check(shape, slot);
    const CodecInfo& info = codec_info(shape.codec);
    const std::size_t bits = info.bits;
    if (info.rotated) std::fill_n(row, shape.head_dim * bits / 8, std::uint8_t{0});
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        const std::size_t index = panel_index(info.panel, shape.side, shape.head_dim, slot, dim);
        if (!info.rotated) {
            copy_half(row + 2 * dim, tile + 2 * index);
            continue;
        }
        const std::size_t bit = dim * bits;
        const std::uint32_t code = get_code(shape.codec, tile, index) << bit % 8;
        row[bit / 8] |= static_cast<std::uint8_t>(code);
        if (bit % 8 + bits > 8) row[bit / 8 + 1] |= static_cast<std::uint8_t>(code >> 8);
    }
    if (info.rotated) copy_half(row + shape.head_dim * bits / 8, tile + tile_code_bytes(shape) + 2 * slot);
}

void tile_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row) {
    check(shape, slot);
    const CodecInfo& info = codec_info(shape.codec);
    const std::size_t bits = info.bits;
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        const std::size_t index = panel_index(info.panel, shape.side, shape.head_dim, slot, dim);
        if (!info.rotated) {
            copy_half(tile + 2 * index, row + 2 * dim);
            continue;
        }
        const std::size_t bit = dim * bits;
        std::uint32_t code = row[bit / 8];
        if (bit % 8 + bits > 8) code |= static_cast<std::uint32_t>(row[bit / 8 + 1]) << 8;
        set_code(shape.codec, tile, index, code >> bit % 8);  // set_code keeps the low `bits`
    }
    if (info.rotated) copy_half(tile + tile_code_bytes(shape) + 2 * slot, row + shape.head_dim * bits / 8);
}

}  // namespace turboquant
