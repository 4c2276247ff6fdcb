#include "turboquant/codec/tile.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/codec/half.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {

std::string supported_head_dims(int most) {
    std::string all;
    for (const int d : kHeadDims)
        if (d <= most) all += (all.empty() ? "" : ", ") + std::to_string(d);
    return all;
}

namespace {

void check(const TileShape& shape, int slot, std::size_t values) {
    if (!head_dim_supported(shape.head_dim))
        throw std::invalid_argument("tile: head_dim " + std::to_string(shape.head_dim) +
                                    " is not supported; supported: " + supported_head_dims());
    if (values != static_cast<std::size_t>(shape.head_dim))
        throw std::invalid_argument("tile: got " + std::to_string(values) + " values for head_dim " + std::to_string(shape.head_dim));
    if (slot < 0 || slot >= kTileKeys) throw std::invalid_argument("tile: slot " + std::to_string(slot) + " is not in 0..63");
}

/// The codec of a shape that has codes.
const CodecInfo& coded(const TileShape& shape) {
    if (is_composite(shape.codec)) throw std::invalid_argument("tile: composite formats have no row form");
    return codec_info(shape.codec);
}

std::uint32_t read_code(const CodecInfo& c, const TileShape& shape, const std::uint8_t* tile, int slot, int dim) {
    std::uint32_t code = 0;
    for (int b = 0; b < c.bits; ++b) {
        const std::size_t at = code_bit(c, shape, slot, dim, b);
        code |= (tile[at / 8] >> at % 8 & 1u) << b;
    }
    return code;
}

void write_code(const CodecInfo& c, const TileShape& shape, std::uint8_t* tile, int slot, int dim, std::uint32_t code) {
    for (int b = 0; b < c.bits; ++b) {
        const std::size_t at = code_bit(c, shape, slot, dim, b);
        tile[at / 8] = static_cast<std::uint8_t>((tile[at / 8] & ~(1u << at % 8)) | (code >> b & 1u) << at % 8);
    }
}

std::size_t scale_at(const TileShape& shape, int slot) {
    return tile_code_bytes(shape) + sizeof(std::uint16_t) * scale_index(shape.order, slot);
}

void store_half(std::uint8_t* p, std::uint16_t h) {
    p[0] = static_cast<std::uint8_t>(h);
    p[1] = static_cast<std::uint8_t>(h >> 8);
}

float load_half(const std::uint8_t* p) { return from_half(static_cast<std::uint16_t>(p[0] | p[1] << 8)); }

}  // namespace

std::uint32_t get_code(const TileShape& shape, const std::uint8_t* tile, int slot, int dim) {
    return read_code(coded(shape), shape, tile, slot, dim);
}

void set_code(const TileShape& shape, std::uint8_t* tile, int slot, int dim, std::uint32_t code) {
    write_code(coded(shape), shape, tile, slot, dim, code);
}

void tile_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row) {
    check(shape, slot, shape.head_dim);
    const CodecInfo& info = coded(shape);
    const std::size_t bits = info.bits, bytes = shape.head_dim * bits / 8;
    std::fill_n(row, bytes, std::uint8_t{0});
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        const std::size_t bit = dim * bits;
        const std::uint32_t code = read_code(info, shape, tile, slot, dim) << bit % 8;
        for (std::size_t b = 0; b < bit % 8 + bits; b += 8) row[(bit + b) / 8] |= static_cast<std::uint8_t>(code >> b);
    }
    if (info.rotated) std::copy_n(tile + scale_at(shape, slot), 2, row + bytes);
}

void tile_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row) {
    check(shape, slot, shape.head_dim);
    const CodecInfo& info = coded(shape);
    const std::size_t bits = info.bits;
    for (int dim = 0; dim < shape.head_dim; ++dim) {
        const std::size_t bit = dim * bits;
        std::uint32_t code = 0;
        for (std::size_t b = 0; b < bit % 8 + bits; b += 8) code |= static_cast<std::uint32_t>(row[(bit + b) / 8]) << b;
        write_code(info, shape, tile, slot, dim, code >> bit % 8);  // keeps the low `bits`
    }
    if (info.rotated) std::copy_n(row + shape.head_dim * bits / 8, 2, tile + scale_at(shape, slot));
}

void tile_encode(const TileShape& shape, std::uint8_t* tile, int slot, std::span<const float> x, NormMode mode) {
    check(shape, slot, x.size());
    if (is_composite(shape.codec)) return composite_encode(shape, tile, slot, x, mode);
    const CodecInfo& info = codec_info(shape.codec);
    if (!info.rotated) {
        if (!std::ranges::all_of(x, [](float v) { return std::isfinite(v); }))
            throw std::domain_error("tile: the vector holds a NaN or an infinity; check the model's activations");
        for (int i = 0; i < shape.head_dim; ++i) write_code(info, shape, tile, slot, i, to_half(x[i]));
        return;
    }
    const QuantizedVector q = Quantizer(shape.codec, shape.head_dim, mode).quantize(x);
    for (int i = 0; i < shape.head_dim; ++i) write_code(info, shape, tile, slot, i, q.codes[i]);
    store_half(tile + scale_at(shape, slot), to_half(q.scale));
}

void tile_decode_rotated(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> y) {
    check(shape, slot, y.size());
    if (is_composite(shape.codec)) return composite_decode_slot(shape, tile, slot, y);
    const CodecInfo& info = codec_info(shape.codec);
    if (!info.rotated) {
        for (int i = 0; i < shape.head_dim; ++i) y[i] = from_half(static_cast<std::uint16_t>(read_code(info, shape, tile, slot, i)));
        return;
    }
    QuantizedVector q{std::vector<std::uint8_t>(shape.head_dim), load_half(tile + scale_at(shape, slot))};
    for (int i = 0; i < shape.head_dim; ++i) q.codes[i] = static_cast<std::uint8_t>(read_code(info, shape, tile, slot, i));
    Quantizer(shape.codec, shape.head_dim).dequantize_rotated(q, y);
}

}  // namespace turboquant
