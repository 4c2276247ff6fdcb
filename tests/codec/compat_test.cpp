#include "turboquant/codec/compat.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "support.h"

namespace turboquant::compat {
namespace {

constexpr Block kBlocks[] = {Block::turbo2, Block::turbo3, Block::turbo4, Block::turbo4_rnorm};
using Values = std::array<float, kBlockValues>;

Values input(char name) {
    Values x{};
    if (name == 'B') x[5] = 1;
    if (name == 'C') x.fill(1);
    if (name == 'D')
        for (int j = 0; j < kBlockValues; ++j) x[j] = static_cast<float>(j) - 63.5f;
    return x;
}

std::vector<std::uint8_t> encoded(Block b, const Values& x, Table4 table = Table4::old) {
    std::vector<std::uint8_t> bytes(block_bytes(b), 0xee);
    encode(b, x, bytes, table);
    return bytes;
}

// Blocks as the forks write them: A zero, B one-hot at 5, C ones, D a ramp (docs/formats.md).
struct Golden {
    char input;
    Block block;
    const char* hex;
};

// clang-format off
const Golden kGoldens[] = {
    {'A', Block::turbo2, "0000aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"},
    {'A', Block::turbo3, "00000000000000000000000000000000000000000000000000000000000000000000ffffffffffffffffffffffffffffffff"},
    {'A', Block::turbo4, "000088888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888888"},
    {'B', Block::turbo2, "4c39330fcf30c3000fcfc33fcc0c3ff0ccc3fff300c300000c033ff000f00000cf03"},
    {'B', Block::turbo3, "613d99a5659a69aaa565699566a6955a66695559aa69aaaaa6a9955aaa5aaaaa65a9354b09b3792ac79adf900012c7c0001b"},
    {'B', Block::turbo4, "e63b2d2ddd22ddd2222d2dd22222dd22ddd22dd2dd2dd2d2d222dd2d22ddd2d22dd2dddd2ddd22222dd222222222d2222d22dd2d22dd222222dd22222222ddd22d22"},
    {'C', Block::turbo2, "b5495acc90a6f2e44a122d139d9d05a19bf86e2255325148dd11aa6a7a56941ac8ea"},
    {'C', Block::turbo3, "7d49f1d9740df48890715a763b2e4e0776a0d944bb24e2d1bb660180e4ec2d749590a3d8cd1316aac0eb5750200a7f1738fa"},
    {'C', Block::turbo4, "f349ac57e2f210c55ca828ff30ea8a320c27d32c1d15e585f3a35320158acdc5a0dedc5c1a1a3535280e03538272e5e52323aca88a3aca7d585351a3ca15c2e2a8dc"},
    {'D', Block::turbo2, "e15ea964612e1d7a621799125c55a51635d554cea09ace5bf6112a66aeeec96e62cb"},
    {'D', Block::turbo3, "b05e0389961c7ba5c57b3265e9ee4ab86aaefdd90535d9b6a8664089588d97d9c5934e7472151a021c84b0bc3b0d57ff7ab5"},
    {'D', Block::turbo4, "e35ea6883228133bfa0ce526bd3e1b593f2793851b12e153737243da4a27241e54e46256ecf221a8cca7ecf1be3748ee1304a8293d38f9bcfbe8b6d1eb6c1b798fe2"},
};
// clang-format on

TEST(Compat, GoldenBlocksBitForBit) {
    for (const Golden& g : kGoldens) {
        EXPECT_EQ(test::hex(encoded(g.block, input(g.input))), g.hex) << g.input;
        if (g.block != Block::turbo4) continue;
        const std::string hex = g.hex;
        EXPECT_EQ(test::hex(encoded(Block::turbo4_rnorm, input(g.input))), hex.substr(0, 4) + "0000" + hex.substr(4));
    }
}

// All levels of every table, through a block of norm 1 that holds each code.
TEST(Compat, TablesArePinned) {
    struct Expected {
        Block block;
        Table4 table;
        std::vector<float> levels;
    };
    const Expected cases[] = {
        {Block::turbo2, Table4::old, {.039994f, .133462f}},
        {Block::turbo3, Table4::old, {.021460f, .065717f, .117832f, .190685f}},
        {Block::turbo4, Table4::old, {.006938f, .020989f, .035597f, .051262f, .068756f, .089527f, .117195f, .173926f}},
        {Block::turbo4, Table4::lloyd, {.011349f, .034299f, .058050f, .083292f, .111036f, .143016f, .182877f, .241529f}}};
    for (const Expected& e : cases) {
        const int half = static_cast<int>(e.levels.size()), bits = half == 2 ? 2 : half == 4 ? 3 : 4;
        std::vector<std::uint8_t> bytes(block_bytes(e.block));
        bytes[1] = 0x3c;
        for (int j = 0; j < kBlockValues; ++j) {  // code j mod 2^bits at value j
            const int code = j % (2 * half), low = bits == 4 ? code : code & 3, per_byte = bits == 4 ? 2 : 4;
            bytes[2 + j / per_byte] = static_cast<std::uint8_t>(bytes[2 + j / per_byte] | low << (8 / per_byte * (j % per_byte)));
            if (bits == 3) bytes[34 + j / 8] = static_cast<std::uint8_t>(bytes[34 + j / 8] | code / 4 << (j % 8));
        }
        Values y;
        decode(e.block, bytes, y, false, e.table);
        for (int j = 0; j < kBlockValues; ++j) {
            const int code = j % (2 * half);
            EXPECT_EQ(y[j], code < half ? -e.levels[half - 1 - code] : e.levels[code - half]) << j;
        }
    }
}

TEST(Compat, BlockSizes) {
    EXPECT_EQ(block_bytes(Block::turbo2), 34u);
    EXPECT_EQ(block_bytes(Block::turbo3), 50u);
    EXPECT_EQ(block_bytes(Block::turbo4), 66u);
    EXPECT_EQ(block_bytes(Block::turbo4_rnorm), 68u);
}

// Errors of the whole codec on Gaussian blocks; the old 4-bit table has twice that of the converged one.
TEST(Compat, ErrorsOfTheTables) {
    struct Expected {
        Block block;
        Table4 table;
        double error;
    };
    const Expected cases[] = {{Block::turbo2, Table4::old, .1189},        {Block::turbo3, Table4::old, .03389},
                              {Block::turbo4, Table4::old, .01818},       {Block::turbo4, Table4::lloyd, .00920},
                              {Block::turbo4_rnorm, Table4::old, .01818}, {Block::turbo4_rnorm, Table4::lloyd, .00920}};
    for (const Expected& e : cases) {
        SplitMix64 random(1);
        double sum = 0, rotated = 0;
        Values x, y;
        constexpr int kN = 3000;
        for (int i = 0; i < kN; ++i) {
            for (float& v : x) v = static_cast<float>(random.normal());
            const auto bytes = encoded(e.block, x, e.table);
            decode(e.block, bytes, y, true, e.table);
            sum += test::relative_error(x, y) / kN;
            decode(e.block, bytes, y, false, e.table);
            rotated += test::relative_error(x, y) / kN;
        }
        EXPECT_NEAR(sum, e.error, .015 * e.error);
        EXPECT_GT(rotated, 1) << "the forks' decoders leave the rotation on";
    }
}

TEST(Compat, DecodingWithTheWrongTableIsFarOff) {
    const Values x = input('D');
    Values right, wrong;
    const auto bytes = encoded(Block::turbo4, x, Table4::lloyd);
    decode(Block::turbo4, bytes, right, true, Table4::lloyd);
    decode(Block::turbo4, bytes, wrong, true, Table4::old);
    EXPECT_LT(test::relative_error(x, right), .012);
    EXPECT_GT(test::relative_error(x, wrong), .03);
}

TEST(Compat, DecodeInvertsTheGoldens) {
    for (const Golden& g : kGoldens) {
        if (g.input == 'A') continue;
        const Values x = input(g.input);
        Values y;
        decode(g.block, encoded(g.block, x), y, true);
        EXPECT_LT(test::relative_error(x, y), g.block == Block::turbo2 ? .14 : .05) << g.input;
    }
}

TEST(Compat, RejectsWrongSizesAndNonFiniteValues) {
    Values x = input('C'), y;
    for (Block b : kBlocks)
        for (int off : {-1, 1}) {
            std::vector<std::uint8_t> bytes(block_bytes(b) + off);
            EXPECT_THROW(encode(b, x, bytes), std::invalid_argument);
            EXPECT_THROW(decode(b, bytes, y, false), std::invalid_argument);
        }
    for (float bad : {std::nanf(""), std::numeric_limits<float>::infinity(), 3e38f}) {
        x[0] = bad;
        EXPECT_THROW(encoded(Block::turbo3, x), std::domain_error);
    }
}

}  // namespace
}  // namespace turboquant::compat
