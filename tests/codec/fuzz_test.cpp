// Deterministic fuzz: any bytes must decode without undefined behaviour (run under the sanitizers), and to finite values if the scale is.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "support.h"
#include "turboquant/codec/compat.h"
#include "turboquant/codec/tile.h"

namespace turboquant {
namespace {

bool finite_half(const std::uint8_t* p) { return (p[1] & 0x7c) != 0x7c; }

template <class Values>
bool all_finite(const Values& y) {
    for (float v : y)
        if (!std::isfinite(v)) return false;
    return true;
}

TEST(Fuzz, RandomTilesAndRows) {
    SplitMix64 random(1);
    int finite = 0, other = 0;
    for (auto [id, d] : test::codecs_and_sizes())
        for (Side side : {Side::key, Side::value}) {
            const TileShape shape{id, side, d};
            auto tile = test::random_bytes(random, tile_bytes(shape));
            const auto before = tile;
            std::vector<std::uint8_t> row(row_bytes(id, d));
            std::vector<float> y(d);
            for (int slot = 0; slot < kTileKeys; ++slot) {
                tile_decode_rotated(shape, tile.data(), slot, y);
                tile_get_row(shape, tile.data(), slot, row.data());
                tile_set_row(shape, tile.data(), slot, row.data());
                if (id == CodecId::raw) continue;
                const bool ok = finite_half(row.data() + row.size() - 2);
                ++(ok ? finite : other);
                ASSERT_TRUE(!ok || all_finite(y)) << codec_info(id).name;
            }
            ASSERT_EQ(tile, before);
        }
    EXPECT_GT(finite, 100);
    EXPECT_GT(other, 100);  // NaN and infinite scales were among them
}

TEST(Fuzz, RandomBlocks) {
    SplitMix64 random(2);
    std::array<float, compat::kBlockValues> y;
    for (compat::Block b : {compat::Block::turbo2, compat::Block::turbo3, compat::Block::turbo4, compat::Block::turbo4_rnorm})
        for (int i = 0; i < 500; ++i) {
            const auto bytes = test::random_bytes(random, compat::block_bytes(b));
            for (bool unrotate : {false, true})
                for (auto table : {compat::Table4::old, compat::Table4::lloyd}) {
                    compat::decode(b, bytes, y, unrotate, table);
                    ASSERT_TRUE(!finite_half(bytes.data()) || all_finite(y));
                }
        }
}

// Floats of any bit pattern, most of them of extreme size: either refused with domain_error or stored with a finite result.
TEST(Fuzz, RandomFloatsAreStoredFiniteOrRefused) {
    SplitMix64 random(3);
    int stored = 0, refused = 0;
    for (auto [id, d] : test::codecs_and_sizes()) {
        const TileShape shape{id, Side::value, d};
        std::vector<std::uint8_t> tile(tile_bytes(shape));
        std::vector<float> x(d), y(d);
        for (int i = 0; i < 20; ++i) {
            for (float& v : x) v = std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
            if (i % 2)
                for (float& v : x)
                    if (!std::isfinite(v)) v = 0;
            try {
                tile_encode(shape, tile.data(), i, x);
                ++stored;
                ASSERT_TRUE(all_finite(x));
            } catch (const std::domain_error&) {
                ++refused;
                ASSERT_FALSE(all_finite(x));
            }
            tile_decode_rotated(shape, tile.data(), i, y);
            ASSERT_TRUE(all_finite(y));
        }
    }
    EXPECT_GT(stored, 100);
    EXPECT_GT(refused, 10);
}

}  // namespace
}  // namespace turboquant
