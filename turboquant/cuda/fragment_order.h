// Fragment order: the tile layout of the GPU kernels. The same codes and scales as in codec/tile.h, and as many bytes; only the place of a
// bit differs. Row form (codec/tile.h) is what the two orders have in common: a saved row does not know where it was kept.
//
// A tile belongs to one warp, lane = 4g + t (g < 8, t < 4), and is what mma.m16n8k32 (s8; raw: m16n8k16, f16) takes as its A operand: rows
// are keys for K, dims for V. No head size is padded: n = head_dim/16 *rows* of 32 values are what a lane holds, whatever the format and
// side. A value of a lane has a row, an octet k = 0..3 within it and a place j = 0..7 in the octet; j/4 tells the two registers of a
// look-up apart, j%4 the bytes of one.
//
//   position of a slot: p = slot ^ 7 below 32, else slot; p = 8e + g: cells 31-m and 32+m of a tile lie in one lane (the score term of
//   successive positions is even or odd about the tile's middle).
//
//   keys, scalar     t = dim / (4n), i = dim % (4n). A pair of keys (e, e+1) fills n octets: n/2 of its first key, n/2 of its second, each
//   of 8
//                    successive dims (j = i%8); odd n: the last four dims of both share the last octet, j = 4(e&1) + i%4.
//                    A 4-bit word is the word of the row form; appending a key writes whole words (even n).
//   keys, trellis    t and i as above; row = i % n, j = 4(e/4) + i/n, k = e%4.
//   values, all      g = dim / (2n), i = dim % (2n): row = i % n; slot's p = 8e + 2t + c: j = 4(i/n) + (e&1) + 2c, k = e/2. The order of
//   the
//                    slots is the one in which movmatrix turns the weights of a lane's keys into the other operand.
//
// Words of a row (bit 4j + .. means: in nibble j):
//   turbo2  2: word k/2, bits 2(k%2)..                turbo3  3: word k, bits 0..2 for k < 3; code bit i of k = 3 is bit 3 of word i
//   turbo4  4: word k                                 turbo5  5: as turbo4, code bit 4 is bit k of word 4
//   turbo6  6: as turbo4, bits 4..5 as turbo2 in words 4, 5      turbo8  8: words 2k + j/4, byte j%4
//   trellis codecs: first n words, bit k = trellis bit of (row, k, j); then per row the points:
//   tcq1  none      tcq2  1: bit (k+2)%4      tcq3  2: word k%2, bits 2.. for k < 2, else 0..      tcq5  4: word k
//   tcq4  3: word 0, bit k = the level is negative; words 1, 2 as tcq3. Stored code: see fragment_code().
//   raw: keys: word 4(n(e/2) + i/4) + 2(i/2%2) + e%2, half i%2; values: word 16 row + 4k + 2(e%2) + (i/n), half c.
//
// Word w of a lane lies at byte 512(w/4) + 16 lane + 4(w%4); the last w < 4 words of a lane that are no whole 16 bytes, at 128(w%4) + 4
// lane from there. Scales follow the codes, fp16 [g][e].
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/codec/codec.h"
#include "turboquant/codec/tile.h"

namespace turboquant::cuda {

/// Formats that have a fragment order: all but the composites.
constexpr bool has_fragment_order(CodecId codec) { return !is_composite(codec); }

/// Rows of 32 values that a lane holds.
constexpr int fragment_rows(int head_dim) { return head_dim / 16; }
/// 32-bit words that a lane holds: rows * bits.
constexpr int fragment_words(CodecId codec, int head_dim) { return fragment_rows(head_dim) * codec_info(codec).bits; }

/// Position p of a slot (a cell modulo 64); its own inverse.
constexpr int fragment_position(int slot) { return slot < kTileKeys / 2 ? slot ^ 7 : slot; }

/// Where a value lies among those of its warp.
struct FragmentValue {
    int lane, row, octet, place;
};

/// What the order asks of a codec. Device code, which cannot read the table of codecs, brings its own.
struct FragmentFormat {
    Family family;
    int bits;
};
constexpr FragmentFormat fragment_format(CodecId codec) { return {codec_info(codec).family, codec_info(codec).bits}; }

constexpr FragmentValue fragment_value(FragmentFormat format, Side side, int head_dim, int slot, int dim) {
    const int n = fragment_rows(head_dim), p = fragment_position(slot), e = p / 8;
    if (side == Side::value) {
        const int i = dim % (2 * n), c = p & 1;
        return {4 * (dim / (2 * n)) + p % 8 / 2, i % n, e / 2, 4 * (i / n) + (e & 1) + 2 * c};
    }
    const int lane = 4 * (p % 8) + dim / (4 * n), i = dim % (4 * n);
    if (format.family == Family::trellis) return {lane, i % n, e % 4, 4 * (e / 4) + i / n};
    const int half = n / 2;  // whole octets of one key
    const bool shared = i >= 8 * half;
    const int octet = e / 2 * n + (shared ? 2 * half : e % 2 * half + i / 8);
    return {lane, octet / 4, octet % 4, shared ? 4 * (e % 2) + i % 4 : i % 8};
}
constexpr FragmentValue fragment_value(CodecId codec, Side side, int head_dim, int slot, int dim) {
    return fragment_value(fragment_format(codec), side, head_dim, slot, dim);
}

/// The code as it is stored: a permutation of the codes, the identity except for tcq4, whose level is found by magnitude: there the point's
/// top bit becomes "negative", and the points of negative levels count from the middle outwards as those of positive ones do.
constexpr std::uint32_t fragment_code(CodecId codec, std::uint32_t code) {
    return codec == CodecId::tcq4 ? code ^ (code & 4 ? 4 : 7) : code;
}
/// Its inverse.
constexpr std::uint32_t code_of_fragment(CodecId codec, std::uint32_t stored) {
    return codec == CodecId::tcq4 ? stored ^ (stored & 4 ? 7 : 4) : stored;
}

struct FragmentBit {
    int lane, word, shift;
};

/// Place of bit `bit` of the stored code; raw: of the fp16 value.
constexpr FragmentBit fragment_bit(FragmentFormat info, Side side, int head_dim, int slot, int dim, int bit) {
    const int n = fragment_rows(head_dim);
    if (info.family == Family::raw) {
        const int e = fragment_position(slot) / 8, c = fragment_position(slot) % 8;
        if (side == Side::value) {
            const int i = dim % (2 * n);
            return {4 * (dim / (2 * n)) + c / 2, 16 * (i % n) + 4 * (e / 2) + 2 * (e % 2) + i / n, 16 * (c & 1) + bit};
        }
        const int i = dim % (4 * n);
        return {4 * c + dim / (4 * n), 4 * (n * (e / 2) + i / 4) + 2 * (i / 2 % 2) + e % 2, 16 * (i & 1) + bit};
    }
    const FragmentValue v = fragment_value(info, side, head_dim, slot, dim);
    const int k = v.octet, nibble = 4 * v.place;
    if (info.family == Family::trellis) {
        if (bit == info.bits - 1) return {v.lane, v.row, nibble + k};
        const int points = n + (info.bits - 1) * v.row, pair = k < 2 ? 2 : 0;
        switch (info.bits) {
            case 2:
                return {v.lane, points, nibble + (k + 2) % 4};
            case 3:
                return {v.lane, points + k % 2, nibble + pair + bit};
            case 4:
                if (bit == 2) return {v.lane, points, nibble + k};
                return {v.lane, points + 1 + k % 2, nibble + pair + bit};
            default:
                return {v.lane, points + k, nibble + bit};
        }
    }
    const int words = info.bits * v.row;
    switch (info.bits) {
        case 2:
            return {v.lane, words + k / 2, nibble + 2 * (k % 2) + bit};
        case 3:
            if (k == 3) return {v.lane, words + bit, nibble + 3};
            return {v.lane, words + k, nibble + bit};
        case 8:
            return {v.lane, words + 2 * k + v.place / 4, 8 * (v.place % 4) + bit};
        default:
            if (bit < 4) return {v.lane, words + k, nibble + bit};
            if (info.bits == 5) return {v.lane, words + 4, nibble + k};
            return {v.lane, words + 4 + k / 2, nibble + 2 * (k % 2) + bit - 4};
    }
}
constexpr FragmentBit fragment_bit(CodecId codec, Side side, int head_dim, int slot, int dim, int bit) {
    return fragment_bit(fragment_format(codec), side, head_dim, slot, dim, bit);
}

/// Byte of a lane's word in a tile whose lanes hold n_words each.
constexpr std::size_t fragment_word_offset(int n_words, int lane, int word) {
    const std::size_t chunk = 512 * static_cast<std::size_t>(word / 4);
    return word / 4 < n_words / 4 ? chunk + 16 * lane + 4 * (word % 4) : chunk + 128 * (word % 4) + 4 * lane;
}

/// Byte of a slot's scale (rotated codecs).
constexpr std::size_t fragment_scale_offset(const TileShape& s, int slot) {
    const int p = fragment_position(slot);
    return tile_code_bytes(s) + 2 * static_cast<std::size_t>(p % 8 * 8 + p / 8);
}

/// Code of (slot, dim) as the codec knows it (raw: the fp16 bits), from a whole tile in fragment order, and back: the specification, bit by
/// bit.
std::uint32_t get_fragment_code(const TileShape& shape, const std::uint8_t* tile, int slot, int dim);
void set_fragment_code(const TileShape& shape, std::uint8_t* tile, int slot, int dim, std::uint32_t code);

/// A slot of a tile in fragment order into row form and back, as tile_get_row and tile_set_row do for the CPU's order. `row` holds
/// row_bytes(...) bytes. Throws std::invalid_argument for composites, head sizes that are not supported and slots outside of 0..63.
void fragment_get_row(const TileShape& shape, const std::uint8_t* tile, int slot, std::uint8_t* row);
void fragment_set_row(const TileShape& shape, std::uint8_t* tile, int slot, const std::uint8_t* row);

}  // namespace turboquant::cuda
