// The GPU's tile order: nothing lost, nothing used twice, and bytes that must not change (caches live in it, kernels are built on it).
#include "turboquant/cuda/fragment_order.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <vector>

#include "turboquant/codec/random.h"

namespace turboquant::cuda {
namespace {

std::vector<TileShape> shapes() {
    std::vector<TileShape> all;
    for (const CodecInfo& c : kCodecs)
        for (const int d : kHeadDims)
            for (const Side side : {Side::key, Side::value})
                if (has_fragment_order(c.id)) all.push_back({c.id, side, d});
    return all;
}

std::string name(const TileShape& s) {
    return std::string(codec_info(s.codec).name) + (s.side == Side::key ? " keys " : " values ") + std::to_string(s.head_dim);
}

// Every bit of a code has a place of its own, and together they fill the tile.
TEST(FragmentOrder, EveryBitHasItsPlace) {
    for (const TileShape& s : shapes()) {
        SCOPED_TRACE(name(s));
        std::vector<int> seen(tile_bytes(s) * 8, 0);
        const int n_words = fragment_words(s.codec, s.head_dim);
        for (int slot = 0; slot < kTileKeys; ++slot) {
            for (int dim = 0; dim < s.head_dim; ++dim)
                for (int i = 0; i < codec_info(s.codec).bits; ++i) {
                    const FragmentBit b = fragment_bit(s.codec, s.side, s.head_dim, slot, dim, i);
                    ASSERT_TRUE(b.lane >= 0 && b.lane < 32 && b.word >= 0 && b.word < n_words && b.shift >= 0 && b.shift < 32);
                    ++seen.at(fragment_word_offset(n_words, b.lane, b.word) * 8 + b.shift);
                }
            for (int i = 0; codec_info(s.codec).rotated && i < 16; ++i) ++seen.at(fragment_scale_offset(s, slot) * 8 + i);
        }
        EXPECT_TRUE(std::ranges::all_of(seen, [](int n) { return n == 1; }));
    }
}

// CPU tile -> row form -> fragments -> row form -> CPU tile.
TEST(FragmentOrder, RowFormIsTheContract) {
    SplitMix64 random(5);
    for (const TileShape& s : shapes()) {
        SCOPED_TRACE(name(s));
        std::vector<std::uint8_t> tile(tile_bytes(s)), fragments(tile_bytes(s), 0xa5), back(tile_bytes(s), 0x5a);
        for (std::uint8_t& b : tile) b = static_cast<std::uint8_t>(random.bits());
        std::vector<std::uint8_t> row(row_bytes(s.codec, s.head_dim)), other(row.size());
        for (const int slot : {5, 0, 63, 31, 32})  // in any order
            tile_get_row(s, tile.data(), slot, row.data()), fragment_set_row(s, fragments.data(), slot, row.data());
        for (int slot = 0; slot < kTileKeys; ++slot) {
            tile_get_row(s, tile.data(), slot, row.data());
            fragment_set_row(s, fragments.data(), slot, row.data());
        }
        for (int slot = 0; slot < kTileKeys; ++slot) {
            tile_get_row(s, tile.data(), slot, row.data());
            fragment_get_row(s, fragments.data(), slot, other.data());
            ASSERT_EQ(row, other) << slot;
            tile_set_row(s, back.data(), slot, other.data());
        }
        EXPECT_EQ(back, tile);
    }
}

std::uint64_t fnv(const std::vector<std::uint8_t>& bytes) {
    std::uint64_t h = 14695981039346656037u;
    for (const std::uint8_t b : bytes) h = (h ^ b) * 1099511628211u;
    return h;
}

// Codes that differ everywhere, in every format: the hash of the tile.
std::uint64_t golden(const TileShape& s) {
    std::vector<std::uint8_t> tile(tile_bytes(s), 0), row(row_bytes(s.codec, s.head_dim));
    for (int slot = 0; slot < kTileKeys; ++slot) {
        for (std::size_t i = 0; i < row.size(); ++i)
            row[i] = static_cast<std::uint8_t>(i * 167 + static_cast<std::size_t>(slot) * 101 + (i * slot >> 3));
        fragment_set_row(s, tile.data(), slot, row.data());
    }
    return fnv(tile);
}

struct Golden {
    CodecId codec;
    std::uint64_t key_128, value_128, key_80, value_80;
};
using enum CodecId;
constexpr Golden kGolden[] = {
    {turbo4, 0x19b02e2602993275u, 0x8ec14b935a53e039u, 0x7be528ed707a235u, 0x850da588b811d646u},
    {turbo3, 0x786295ee15ccdafau, 0xab52cb336debd1a8u, 0xebc968d7dd039f5bu, 0x54b7d8695f3421a8u},
    {turbo2, 0xa3555bfa21d9ed70u, 0xc7a3af439c3d3d3au, 0xc2d12e1dd5929d8eu, 0xa37746496e5741bdu},
    {turbo5, 0xdd3826794b304106u, 0xd3dbda68dcc6727au, 0x51e137de9c7638f4u, 0xe54de42b5b8ba6e6u},
    {turbo6, 0x39c519899039b75au, 0xd14428f45e88d3bu, 0xad00d08b6a36c529u, 0xd752c94fc4119fd5u},
    {turbo8, 0x4032913718b58a15u, 0xb461b9415b855255u, 0xf64dd9c4dccc7d85u, 0xdfa4a601ba00de85u},
    {raw, 0xc6a319003d63cbe5u, 0xab503440cf41dc65u, 0xccae1c3522401055u, 0x85d9d03952706a3du},
    {tcq4, 0x725ba1a930317c78u, 0x40fd3caaf0b9d50bu, 0xf6e82ede8ed8d9c1u, 0xda33741834c3149u},
    {tcq3, 0x81ae9e66a5b758c3u, 0x9614dad80925a242u, 0x3b8c2a95e01bd6dcu, 0xa9e563c4f0d33fa8u},
    {tcq2, 0xe169b6c238caf6acu, 0xecc91c0973c7ecfu, 0xee94579eea832cau, 0x379cf60e9144a589u},
    {tcq5, 0xbc5c535cb4838bfbu, 0xe88a976337be76u, 0x9411018f5f19dee4u, 0xab122cafaa27650eu},
    {tcq1, 0x6dff42b1283362c8u, 0xfda87126e2d7b453u, 0x431ed8a4d969e592u, 0xddf42c0e28ddc1a6u},
};

TEST(FragmentOrder, GoldenTiles) {
    std::set<CodecId> seen;
    for (const Golden& g : kGolden) {
        seen.insert(g.codec);
        EXPECT_EQ(golden({g.codec, Side::key, 128}), g.key_128) << codec_info(g.codec).name;
        EXPECT_EQ(golden({g.codec, Side::value, 128}), g.value_128) << codec_info(g.codec).name;
        EXPECT_EQ(golden({g.codec, Side::key, 80}), g.key_80) << codec_info(g.codec).name;
        EXPECT_EQ(golden({g.codec, Side::value, 80}), g.value_80) << codec_info(g.codec).name;
    }
    for (const CodecInfo& c : kCodecs) EXPECT_EQ(seen.contains(c.id), has_fragment_order(c.id)) << c.name;
}

// What the kernels count on: words of 4-bit keys are those of the row form, a 16-byte load is one lane's.
TEST(FragmentOrder, WordsOfFourBitKeysAreTheRowForms) {
    const TileShape s{turbo4, Side::key, 128};
    std::vector<std::uint8_t> tile(tile_bytes(s), 0), row(row_bytes(s.codec, s.head_dim));
    for (std::size_t i = 0; i < row.size(); ++i) row[i] = static_cast<std::uint8_t>(i + 1);
    fragment_set_row(s, tile.data(), 32 + 8 * 2 + 3, row.data());  // e = 6, g = 3
    for (int t = 0; t < 4; ++t)
        for (int i = 0; i < 16; ++i) EXPECT_EQ(tile[6 * 512 + (4 * 3 + t) * 16 + i], row[16 * t + i]);
    EXPECT_EQ(tile[tile_code_bytes(s) + 2 * (3 * 8 + 6)], row[64]);
}

TEST(FragmentOrder, StoredCodesAreAPermutation) {
    for (const CodecInfo& c : kCodecs)
        for (std::uint32_t code = 0; has_fragment_order(c.id) && code < 1u << c.bits; ++code)
            ASSERT_EQ(code_of_fragment(c.id, fragment_code(c.id, code)), code) << c.name;
}

TEST(FragmentOrder, RefusesWhatItHasNot) {
    std::vector<std::uint8_t> tile(1 << 16), row(1 << 10);
    EXPECT_THROW(fragment_get_row({outlier3, Side::key, 128}, tile.data(), 0, row.data()), std::invalid_argument);
    EXPECT_THROW(fragment_get_row({turbo4, Side::key, 100}, tile.data(), 0, row.data()), std::invalid_argument);
    EXPECT_THROW(fragment_set_row({turbo4, Side::key, 128}, tile.data(), 64, row.data()), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant::cuda
