// The encoding kernels without a GPU: whole blocks of them, run by an emulator of a warp, against the scalar specification, in row form.
#include <gtest/gtest.h>

#include <algorithm>
#include <span>
#include <vector>

#include "turboquant/codec/random.h"
#include "turboquant/cuda/format_tables.h"
#include "turboquant/cuda/impl/encode_scalar.h"
#include "turboquant/cuda/impl/encode_trellis.h"
#include "turboquant/cuda/impl/rows.h"

namespace turboquant::cuda {
namespace {

// The memory of a block, 16-byte aligned.
struct SharedMemory {
    explicit SharedMemory(std::size_t n) : bytes(n + 16) {}
    std::uint8_t* get() { return bytes.data() + (16 - reinterpret_cast<std::uintptr_t>(bytes.data()) % 16) % 16; }
    std::vector<std::uint8_t> bytes;
};

template <class F>
void for_tiles(int head_dim, F f) {
    switch (column_tiles(head_dim)) {
        case 1:
            return f(std::integral_constant<int, 1>{});
        case 2:
            return f(std::integral_constant<int, 2>{});
        case 4:
            return f(std::integral_constant<int, 4>{});
        default:
            return f(std::integral_constant<int, 5>{});
    }
}

struct Batch {
    TileShape shape;
    FormatTables tables;
    HeadFormat head;
    std::vector<float> x, scales, turns, offsets;
    std::vector<std::uint16_t> halves;
    std::vector<std::int32_t> ids;
    std::vector<std::int64_t> cells;
    std::vector<std::uint8_t> tiles, old;
    std::uint32_t bad = 0;
    EncodeCall call{};

    Batch(TileShape s, int n, bool scattered, bool offset, bool half) : shape(s), tables(make_format_tables(s.codec, s.head_dim)) {
        SplitMix64 random(s.head_dim);
        const std::size_t d = s.head_dim;
        const auto normals = [&](std::size_t count, float size) {
            std::vector<float> v(count);
            for (float& f : v) f = size * static_cast<float>(random.normal());
            return v;
        };
        x = normals(n * d, 3), turns = normals(n * 2 * d, 1), offsets = normals(2 * 2 * d, 5), scales = normals(d, 1);
        for (float& f : x) halves.push_back(to_half(f));
        if (half) std::ranges::transform(halves, x.begin(), from_half);
        for (int i = 0; i < n; ++i) cells.push_back(scattered ? (i * 37 + 11) % 192 : 64 + i), ids.push_back(i % 3 - 1);
        tiles.resize(3 * tile_bytes(s));
        for (std::uint8_t& b : tiles) b = static_cast<std::uint8_t>(random.bits());
        old = tiles;
        head = {&tables, 0, 0};
        call.heads = &head, call.side = s.side, call.tiles = tiles.data(), call.tile_stride = tile_bytes(s);
        call.norm_mode = default_norm_mode(s.side);
        call.x = half ? static_cast<const void*>(halves.data()) : x.data(), call.half_input = half, call.token_stride = d;
        call.cells = cells.data(), call.n = n, call.not_finite = &bad;
        if (offset) {
            call.scales = scales.data(), call.turns = turns.data(), call.offsets = offsets.data(), call.offset_ids = ids.data();
            call.offset_stride = 2 * d;
            for (std::size_t i = 0; i < x.size(); ++i) {
                const std::size_t token = i / d, k = i % d;
                expected.push_back(x[i] * scales[k]);
                if (ids[token] < 0) continue;
                const float *o = offsets.data() + ids[token] * 2 * d, *t = turns.data() + token * 2 * d;
                expected.back() -= std::fma(o[k], t[k], o[d + k] * t[d + k]);
            }
        } else {
            expected = x;
        }
    }
    std::vector<float> expected;  // what is encoded

    void encode(int tokens_per_block, int warps) {
        call.tokens_per_block = tokens_per_block;
        const int blocks = (call.n + tokens_per_block - 1) / tokens_per_block + (tokens_per_block == 64);
        const bool trellis = tables.family == Family::trellis;
        SharedMemory shared(trellis ? trellis_shared_bytes(shape.head_dim, warps)
                                    : scalar_shared_bytes(shape.head_dim, tables.bits, tables.n_cells));
        for_tiles(shape.head_dim, [&](auto tiles_) {
            constexpr int k = decltype(tiles_)::value;
            for (int b = 0; b < blocks; ++b)
                emulator::Block::run(32 * warps, [&](int t) {
                    const Thread thread{t, 32 * warps};
                    if (trellis)
                        encode_trellis<k>(call, b, 0, thread, shared.get());
                    else
                        encode_scalar<k>(call, b, 0, thread, shared.get());
                });
        });
    }
    std::vector<std::uint8_t> row(const std::vector<std::uint8_t>& all, std::int64_t cell) const {
        std::vector<std::uint8_t> r(row_bytes(shape.codec, shape.head_dim));
        fragment_get_row(shape, all.data() + cell / 64 * tile_bytes(shape), static_cast<int>(cell % 64), r.data());
        return r;
    }
    // Vectors whose codes are those of the specification, all others of the cache unchanged.
    int check() const {
        int equal = 0;
        const std::size_t d = shape.head_dim;
        std::vector<std::uint8_t> tile(tile_bytes(shape)), spec(row_bytes(shape.codec, shape.head_dim));
        for (int i = 0; i < call.n; ++i) {
            tile_encode(shape, tile.data(), 5, std::span(expected).subspan(i * d, d), call.norm_mode);
            tile_get_row(shape, tile.data(), 5, spec.data());
            const std::vector<std::uint8_t> got = row(tiles, cells[i]);
            const bool rotated = codec_info(shape.codec).rotated;
            equal += std::equal(spec.begin(), spec.end() - (rotated ? 2 : 0), got.begin());
            const auto scale = [](const std::vector<std::uint8_t>& r) {
                return from_half(static_cast<std::uint16_t>(r[r.size() - 2] | r[r.size() - 1] << 8));
            };
            if (rotated) {
                EXPECT_NEAR(scale(got) / scale(spec), 1, codec_info(shape.codec).family == Family::trellis ? .03 : .002);
            }
        }
        for (std::int64_t c = 0; c < 192; ++c)
            if (std::ranges::find(cells, c) == cells.end()) {
                EXPECT_EQ(row(tiles, c), row(old, c)) << c;
            }
        return equal;
    }
};

class EncodeEmulated : public testing::TestWithParam<CodecId> {
  protected:
    void SetUp() override { emulator::kWideMetrics = true; }
    bool trellis() const { return codec_info(GetParam()).family == Family::trellis; }
    bool raw() const { return codec_info(GetParam()).family == Family::raw; }
};

TEST_P(EncodeEmulated, EqualsTheSpecification) {
    if (raw()) GTEST_SKIP() << "raw: see RawEqualsTheSpecification";
    int n = 0, equal = 0;
    for (const int d : kHeadDims)
        for (const Side side : {Side::key, Side::value}) {
            SCOPED_TRACE(std::to_string(d) + (side == Side::key ? " key" : " value"));
            const bool large = d > 128;
            Batch b({GetParam(), side, d}, large ? 6 : 20, true, side == Side::key, d == 96 || d == 256);
            b.encode(trellis() ? 32 : 16, trellis() && !large ? 4 : 2);
            n += b.call.n, equal += b.check();
        }
    // Whole tiles and what is left of them at both ends; blocks of one token.
    for (const Side side : {Side::key, Side::value}) {
        Batch whole({GetParam(), side, 80}, 100, false, false, false);
        whole.encode(trellis() ? 16 : 64, trellis() ? 2 : 4);
        n += 100, equal += whole.check();
        Batch single({GetParam(), side, 64}, 3, false, side == Side::key, true);
        emulator::kWideMetrics = false;
        single.encode(1, 1);
        n += 3, equal += single.check();
    }
    EXPECT_GE(equal, n - 2) << "of " << n;
}

TEST_P(EncodeEmulated, NotFiniteBecomesZero) {
    if (raw()) GTEST_SKIP() << "raw: see RawEqualsTheSpecification";
    Batch b({GetParam(), Side::key, 64}, 3, false, false, false);
    b.x[64 + 9] = std::numeric_limits<float>::infinity();
    b.encode(1, 1);
    EXPECT_EQ(b.bad, 1u);
    const auto scale = [&](int i) { return b.row(b.tiles, b.cells[i]).back() << 8 | b.row(b.tiles, b.cells[i]).end()[-2]; };
    EXPECT_EQ(scale(1), 0);
    EXPECT_NE(scale(0), 0);
}

TEST_P(EncodeEmulated, RowsAndDecoding) {
    for (const int d : {64, 80, 576})
        for (const Side side : {Side::key, Side::value}) {
            const TileShape s{GetParam(), side, d};
            Batch b(s, 4, true, false, false);
            EncodePlan plan;
            plan.side = side, plan.head_dim = d, plan.n_head = 1, plan.tiles = b.tiles.data(), plan.tile_stride = tile_bytes(s);
            plan.heads = &b.head, plan.row_bytes = row_bytes(GetParam(), d);
            std::vector<float> x(d), out(d), expected(d);
            std::vector<std::uint8_t> codes(d), cpu(tile_bytes(s));
            for (const std::int64_t cell : {3, 100}) {
                std::vector<std::uint8_t> row(plan.row_bytes), spec = b.row(b.tiles, cell);
                if (codec_info(s.codec).rotated) {  // a scale that is finite
                    spec.end()[-1] = 0x3c;
                    emulator::Block::run(32, [&](int lane) { set_row(plan, cell, 0, lane, spec.data()); });
                }
                emulator::Block::run(32, [&](int lane) { get_row(plan, cell, 0, lane, row.data()); });
                EXPECT_EQ(row, spec);
                emulator::Block::run(32, [&](int lane) { set_row(plan, 7, 0, lane, row.data()); });
                EXPECT_EQ(b.row(b.tiles, 7), spec);
                tile_set_row(s, cpu.data(), 0, spec.data());
                tile_decode_rotated(s, cpu.data(), 0, expected);
                if (codec_info(s.codec).rotated) rotation_for(d).inverse(expected);
                DecodeArgs a;
                a.cells = &cell, a.n = 1, a.out = out.data(), a.out_is_half = false, a.token_stride = d;
                emulator::Block::run(32, [&](int lane) { decode_row(plan, a, 0, 0, lane, x.data(), codes.data()); });
                for (int i = 0; i < d; ++i)
                    if (std::isfinite(expected[i])) {
                        ASSERT_NEAR(out[i], expected[i], 2e-5f * std::max(1.0f, std::abs(expected[i]))) << i;
                    }
            }
        }
}

TEST(EncodeEmulatedRaw, RawEqualsTheSpecification) {
    for (const int d : kHeadDims)
        for (const Side side : {Side::key, Side::value}) {
            Batch b({CodecId::raw, side, d}, 5, true, side == Side::key, false);
            for (int i = 0; i < 5; ++i) emulator::Block::run(32, [&](int t) { encode_raw(b.call, i, 0, {t, 32}); });
            EXPECT_EQ(b.check(), 5) << d;
        }
}

TEST(EncodeEmulatedTables, EveryFormatHasCells) {
    for (const CodecInfo& c : kCodecs)
        for (const int d : kHeadDims) {
            if (!has_fragment_order(c.id)) {
                EXPECT_THROW(make_format_tables(c.id, d), std::invalid_argument);
                continue;
            }
            const FormatTables f = make_format_tables(c.id, d);
            if (c.rotated) {
                EXPECT_GE(f.n_cells, 8) << c.name << d;
            }
            EXPECT_LE(f.n_cells, c.family == Family::trellis ? kTrellisCells : kMaxCells) << c.name << d;
        }
}

INSTANTIATE_TEST_SUITE_P(Codecs, EncodeEmulated, testing::ValuesIn([] {
                             std::vector<CodecId> ids;
                             for (const CodecInfo& c : kCodecs)
                                 if (has_fragment_order(c.id)) ids.push_back(c.id);
                             return ids;
                         }()),
                         [](const auto& i) { return std::string(codec_info(i.param).name); });

}  // namespace
}  // namespace turboquant::cuda
