#include "turboquant/codec/tile.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "support.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

using test::random_bytes;

std::vector<std::pair<Side, TileOrder>> sides_and_orders() {
    std::vector<std::pair<Side, TileOrder>> all;
    for (const Side side : {Side::key, Side::value})
        for (const TileOrder order : kTileOrders) all.emplace_back(side, order);
    return all;
}

// The bit planes of panel_order.h, spelled out for one unit of 256 indices.
std::vector<std::uint8_t> reference_unit(CodecId codec, const std::vector<std::uint32_t>& v) {
    std::vector<std::uint8_t> out;
    const auto plane4 = [&](int shift) {
        for (int h = 0; h < 2; ++h)
            for (int l = 0; l < 64; ++l)
                out.push_back(static_cast<std::uint8_t>((v[128 * h + l] >> shift & 15) | (v[128 * h + 64 + l] >> shift & 15) << 4));
    };
    const auto plane2 = [&](int shift) {
        for (int l = 0; l < 64; ++l) {
            std::uint32_t byte = 0;
            for (int k = 0; k < 4; ++k) byte |= (v[64 * k + l] >> shift & 3) << 2 * k;
            out.push_back(static_cast<std::uint8_t>(byte));
        }
    };
    const auto plane1 = [&](int shift) {
        for (int w = 0; w < 4; ++w) {
            std::uint64_t word = 0;
            for (int l = 0; l < 64; ++l) word |= static_cast<std::uint64_t>(v[64 * w + l] >> shift & 1) << l;
            for (int b = 0; b < 8; ++b) out.push_back(static_cast<std::uint8_t>(word >> 8 * b));
        }
    };
    switch (codec) {
        case CodecId::tcq1:
            plane1(0);
            break;
        case CodecId::tcq2:
            plane1(0), plane1(1);
            break;
        case CodecId::tcq4:
            plane2(0), plane1(2), plane1(3);
            break;
        case CodecId::tcq5:
            plane2(0), plane1(2), plane1(3), plane1(4);
            break;
        case CodecId::turbo2:
            plane2(0);
            break;
        case CodecId::turbo3:
        case CodecId::tcq3:
            plane2(0), plane1(2);
            break;
        case CodecId::turbo4:
            plane4(0);
            break;
        case CodecId::turbo5:
            plane4(0), plane1(4);
            break;
        case CodecId::turbo6:
            plane4(0), plane2(4);
            break;
        default:
            out.assign(v.begin(), v.end());
    }
    return out;
}

TEST(Tile, CodesOfThePanelOrderLieInTheDocumentedBitPlanes) {
    SplitMix64 random(1);
    constexpr int d = 64;
    for (const CodecInfo& info : kCodecs)
        for (const Side side : {Side::key, Side::value}) {
            if (!info.rotated) continue;
            const TileShape shape{info.id, side, d};
            std::vector<std::uint8_t> expected, tile(tile_code_bytes(shape), 0xa5);
            std::vector<std::uint32_t> codes(kTileKeys * d);
            for (auto& c : codes) c = static_cast<std::uint32_t>(random.bits() >> (64 - info.bits));
            for (std::size_t unit = 0; unit < codes.size(); unit += 256) {
                const auto begin = codes.begin() + static_cast<std::ptrdiff_t>(unit);
                const auto bytes = reference_unit(info.id, {begin, begin + 256});
                expected.insert(expected.end(), bytes.begin(), bytes.end());
            }
            const auto at = [&](int slot, int dim) { return codes[panels::index(info.levels, side, d, slot, dim)]; };
            for (int slot = kTileKeys; slot-- > 0;)
                for (int dim = 0; dim < d; ++dim) set_code(shape, tile.data(), slot, dim, at(slot, dim));
            EXPECT_EQ(test::hex(tile), test::hex(expected)) << info.name;
            for (int slot = 0; slot < kTileKeys; ++slot)
                for (int dim = 0; dim < d; ++dim)
                    ASSERT_EQ(get_code(shape, tile.data(), slot, dim), at(slot, dim)) << info.name << " " << slot;
        }
}

TEST(Tile, EveryOrderPutsEveryBitIntoAPlaceOfItsOwn) {
    for (const TileOrder order : kTileOrders)
        for (auto [id, d] : test::codecs_and_sizes())
            for (const Side side : {Side::key, Side::value}) {
                const TileShape shape{id, side, d, 0, order};
                const CodecInfo& info = codec_info(id);
                std::vector<int> seen(8 * tile_code_bytes(shape)), scales(kTileKeys);
                for (int slot = 0; slot < kTileKeys; ++slot) {
                    ++scales.at(scale_index(order, slot));
                    for (int dim = 0; dim < d; ++dim)
                        for (int bit = 0; bit < info.bits; ++bit) ++seen.at(code_bit(info, shape, slot, dim, bit));
                }
                EXPECT_EQ(seen, std::vector<int>(seen.size(), 1)) << info.name << " " << d;
                EXPECT_EQ(scales, std::vector<int>(kTileKeys, 1));
            }
}

TEST(Tile, PanelOrderIsAsDocumented) {
    EXPECT_EQ(panels::index(Levels::int8, Side::key, 128, 5, 10), (2u * 64 + 5) * 4 + 2);
    EXPECT_EQ(panels::index(Levels::int8, Side::value, 128, 5, 10), (1u * 128 + 10) * 4 + 1);
    EXPECT_EQ(panels::index(Levels::real, Side::key, 128, 5, 10), 10u * 64 + 5);
    EXPECT_EQ(panels::index(Levels::real, Side::value, 128, 5, 10), 5u * 128 + 10);
}

TEST(Tile, UnknownCodecsAreRefused) {
    for (const int id : {0, 13, 63, 77, 255}) {
        EXPECT_EQ(find_codec_info(CodecId(id)), nullptr);
        EXPECT_THROW(codec_info(CodecId(id)), std::invalid_argument);
        EXPECT_THROW(tile_bytes({CodecId(id), Side::key, 64}), std::invalid_argument);
    }
    for (const CodecInfo& c : kCodecs) EXPECT_EQ(find_codec_info(c.id), &c);
}

TEST(Tile, SizesAreTheAdvertisedRates) {
    EXPECT_EQ(tile_bytes({CodecId::turbo4, Side::key, 128}), 64u * 66);
    EXPECT_EQ(tile_bytes({CodecId::turbo3, Side::key, 128}), 64u * 50);
    EXPECT_EQ(tile_bytes({CodecId::turbo2, Side::value, 128}), 64u * 34);
    EXPECT_EQ(tile_bytes({CodecId::raw, Side::value, 80}), 64u * 160);
    for (auto [id, d] : test::codecs_and_sizes()) {
        EXPECT_DOUBLE_EQ(tile_bytes({id, Side::key, d}) * 8.0 / (kTileKeys * d), bits_per_value(id, d));
        EXPECT_EQ(tile_bytes({id, Side::value, d}), kTileKeys * row_bytes(id, d));
    }
}

TEST(Tile, RowsRoundTripAndLeaveOtherSlotsAlone) {
    SplitMix64 random(2);
    for (auto [id, d] : test::codecs_and_sizes())
        for (auto [side, order] : sides_and_orders()) {
            const TileShape shape{id, side, d, 0, order};
            std::vector<std::uint8_t> tile(tile_bytes(shape));
            std::vector<std::vector<std::uint8_t>> rows;
            for (int slot = 0; slot < kTileKeys; ++slot) {
                rows.push_back(random_bytes(random, row_bytes(id, d)));
                tile_set_row(shape, tile.data(), slot, rows.back().data());
            }
            std::vector<std::uint8_t> row(row_bytes(id, d));
            for (int slot = 0; slot < kTileKeys; ++slot) {
                tile_get_row(shape, tile.data(), slot, row.data());
                ASSERT_EQ(row, rows[slot]) << codec_info(id).name << " head_dim " << d << " slot " << slot;
            }
        }
}

// The contract between sides and orders: a row means the same in all of them.
TEST(Tile, AMovedRowDecodesIdentically) {
    SplitMix64 random(3);
    for (auto [id, d] : test::codecs_and_sizes()) {
        const TileShape key{id, Side::key, d};
        std::vector<std::uint8_t> from(tile_bytes(key)), row(row_bytes(id, d)), back(row.size());
        std::vector<float> a(d), b(d);
        tile_encode(key, from.data(), 7, test::gaussian(random, d));
        tile_get_row(key, from.data(), 7, row.data());
        tile_decode_rotated(key, from.data(), 7, a);
        EXPECT_GT(test::dot(a, a), 0);
        for (auto [side, order] : sides_and_orders()) {
            const TileShape other{id, side, d, 0, order};
            std::vector<std::uint8_t> to(tile_bytes(other));
            tile_set_row(other, to.data(), 62, row.data());
            tile_decode_rotated(other, to.data(), 62, b);
            EXPECT_EQ(a, b);
            tile_get_row(other, to.data(), 62, back.data());
            EXPECT_EQ(back, row);
        }
    }
}

TEST(Tile, EncodeThenDecodeIsTheQuantizer) {
    SplitMix64 random(4);
    for (auto [id, d] : test::codecs_and_sizes())
        for (Side side : {Side::key, Side::value}) {
            const TileShape shape{id, side, d};
            std::vector<std::uint8_t> tile(tile_bytes(shape));
            const std::vector<float> x = test::gaussian(random, d);
            std::vector<float> y(d), expected(d);
            tile_decode_rotated(shape, tile.data(), 63, y);
            EXPECT_EQ(y, std::vector<float>(d)) << "a zero tile must be zero vectors";
            tile_encode(shape, tile.data(), 63, x, NormMode::eden);
            tile_decode_rotated(shape, tile.data(), 63, y);
            if (id == CodecId::raw) {
                for (int i = 0; i < d; ++i) expected[i] = from_half(to_half(x[i]));
            } else {
                const Quantizer q(id, d, NormMode::eden);
                q.dequantize_rotated(q.quantize(x), expected);
            }
            EXPECT_EQ(y, expected);
        }
}

// Bytes of the formats. `row` is what saved states hold: a change there breaks all of them. `key` and `value` are tiles in the order of the
// CPU kernels: nothing outside of a process depends on them, they change with those kernels and with nothing else.
TEST(Tile, GoldenBytes) {
    struct Golden {
        CodecId id;
        std::uint64_t key, value, row;
    };
    const Golden goldens[] = {{CodecId::turbo4, 0x3f5f800f7703f191, 0xf8f3b09c69501071, 0x21677617ae358bb2},
                              {CodecId::turbo3, 0x66b565d87c90403d, 0x578618f01650b42b, 0xa63d2cb967d3b913},
                              {CodecId::turbo2, 0x3f18be1454d90ae8, 0x8218cbf63e3a46f6, 0xc7560b442cd2bfc5},
                              {CodecId::turbo5, 0x9a08db3e67d20ef0, 0x61554971b98996f1, 0x42403da19469a796},
                              {CodecId::turbo6, 0x602b14a96fc1f6d6, 0xe3be6755415181cc, 0x96f11abe03800b8d},
                              {CodecId::turbo8, 0x3ca8736de53c8587, 0x05245ad33dce351b, 0x02093a04f49a58a1},
                              {CodecId::tcq4, 0x74949a7e98a0b33f, 0xe2703bafef3f5f85, 0x25de762ed98e0737},
                              {CodecId::tcq3, 0x40b18dd70f78d78d, 0xbd61712a841f9517, 0x08364e12dcecce70},
                              {CodecId::tcq2, 0x869fa734433e8a70, 0x359ce8244301f2b5, 0xb621725a41112b9f},
                              {CodecId::tcq5, 0xea0c5255e91d52d2, 0xebaf13bbdef90655, 0x2277433882784bf3},
                              {CodecId::tcq1, 0xc0aa8d289f208088, 0x8366a1e2c7e8a4cd, 0x33d848f3a625658d},
                              {CodecId::raw, 0x54fea03d1a9b8b4b, 0x06e091b963248f53, 0xa3219b51e16162ce}};
    for (const Golden& g : goldens) {
        std::uint64_t seen[3];
        for (Side side : {Side::key, Side::value}) {
            const TileShape shape{g.id, side, 80};
            std::vector<std::uint8_t> tile(tile_bytes(shape)), row(row_bytes(g.id, 80));
            for (int slot = 0; slot < kTileKeys; ++slot) {
                std::vector<float> x(80);
                for (int i = 0; i < 80; ++i) x[i] = static_cast<float>((i * 37 + slot * 101) % 97 - 48) / 16;
                tile_encode(shape, tile.data(), slot, x);
            }
            seen[static_cast<int>(side)] = test::hash(tile);
            tile_get_row(shape, tile.data(), 1, row.data());
            seen[2] = test::hash(row);
        }
        EXPECT_EQ(seen[0], g.key) << codec_info(g.id).name;
        EXPECT_EQ(seen[1], g.value) << codec_info(g.id).name;
        EXPECT_EQ(seen[2], g.row) << codec_info(g.id).name;
    }
}

TEST(Tile, RejectsBadSlotsAndSizes) {
    const TileShape shape{CodecId::turbo4, Side::key, 64}, odd{CodecId::turbo4, Side::key, 65};
    std::vector<std::uint8_t> tile(tile_bytes(shape)), row(100);
    std::vector<float> x(64), longer(65);
    for (int slot : {-1, 64}) {
        EXPECT_THROW(tile_encode(shape, tile.data(), slot, x), std::invalid_argument);
        EXPECT_THROW(tile_decode_rotated(shape, tile.data(), slot, x), std::invalid_argument);
        EXPECT_THROW(tile_get_row(shape, tile.data(), slot, row.data()), std::invalid_argument);
        EXPECT_THROW(tile_set_row(shape, tile.data(), slot, row.data()), std::invalid_argument);
    }
    EXPECT_THROW(tile_encode(shape, tile.data(), 0, longer), std::invalid_argument);
    EXPECT_THROW(tile_decode_rotated(odd, tile.data(), 0, longer), std::invalid_argument);
    EXPECT_THROW(tile_get_row(odd, tile.data(), 0, row.data()), std::invalid_argument);
    const TileShape composite{CodecId::prod2, Side::key, 64};
    EXPECT_THROW(get_code(composite, tile.data(), 0, 0), std::invalid_argument);
    EXPECT_THROW(set_code(composite, tile.data(), 0, 0, 0), std::invalid_argument);
    EXPECT_THROW(tile_get_row(composite, tile.data(), 0, row.data()), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
