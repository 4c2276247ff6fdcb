// Bulk moves of rows at every level against their definitions: tile_get_row, tile_set_row, tile_decode_rotated, tile_encode.
#include "turboquant/kernels/rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "tests/kernels/support.h"
#include "turboquant/codec/rotation.h"

namespace turboquant::test {
namespace {

std::vector<SimdLevel> levels() { return {available_simd_levels().begin(), available_simd_levels().end()}; }

/// Hands the parts out backwards: no part may rest on another.
class Backwards final : public Executor {
  public:
    int n_threads() const override { return 3; }

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override {
        for (int i = n; i-- > 0;) part(arg, i);
    }
};

/// Random bytes in tiles of two heads, scales finite; the last head of another format where two are given.
struct Tiles {
    static constexpr int kTiles = 5, kHeads = 2;

    Tiles(CodecId a, CodecId b, Side side, int d) : shape{a, side, d}, second{b, side, d} {
        SplitMix64 random(11);
        at = {{a, 0}, {b, tile_bytes(shape)}};
        stride = tile_bytes(shape) + tile_bytes(second);
        bytes.resize(kTiles * stride);
        for (std::uint8_t& x : bytes) x = static_cast<std::uint8_t>(random.bits());
        for (int t = 0; t < kTiles; ++t)
            for (int h = 0; h < kHeads; ++h)
                for (int slot = 0; slot < kTileKeys; ++slot) {
                    std::vector<float> x(d);
                    for (float& v : x) v = static_cast<float>(random.normal());
                    tile_encode(head(h), tile(t * kTileKeys, h), slot, x);
                }
        // Runs within tiles, single cells, gaps.
        for (int i = 3; i < 130; ++i) cells.push_back(i);
        for (int i = 131; i < kTiles * kTileKeys; i += 7) cells.push_back(i);
    }
    TileShape head(int h) const { return h ? second : shape; }
    std::uint8_t* tile(std::int64_t cell, int h) { return bytes.data() + cell / kTileKeys * stride + at[h].at; }
    std::size_t row_size() const { return row_bytes(shape.codec, shape.head_dim) + row_bytes(second.codec, shape.head_dim); }
    StreamTiles view() {
        TileView v{shape, bytes.data(), tile_bytes(shape), stride, shape.codec == second.codec ? nullptr : at.data()};
        return {v, bytes.data(), kHeads};
    }
    TileShape shape, second;
    std::vector<HeadTiles> at;
    std::size_t stride;
    std::vector<std::uint8_t> bytes;
    std::vector<std::int64_t> cells;
};

class Rows : public testing::TestWithParam<std::tuple<SimdLevel, CodecId>> {
  protected:
    const Kernels& k() const { return kernels(std::get<0>(GetParam())); }
    template <class F>
    void for_each(F f) {
        const CodecId id = std::get<1>(GetParam());
        for (const Side side : {Side::key, Side::value})
            for (const int d : kHeadDims)
                for (const CodecId other : {id, CodecId::turbo3}) {
                    if (other != id && (d != 128 || !codec_info(id).rotated)) continue;
                    SCOPED_TRACE(std::string(codec_info(other).name) + (side == Side::key ? " key " : " value ") + std::to_string(d));
                    Tiles t(id, other, side, d);
                    f(t);
                }
    }
};

TEST_P(Rows, GoOutAndInAsTheirDefinitionSays) {
    for_each([&](Tiles& t) {
        const std::size_t stride = t.row_size() + 3;
        std::vector<std::uint8_t> rows(t.cells.size() * stride, 0xaa), expected = rows;
        for (std::size_t i = 0; i < t.cells.size(); ++i) {
            std::uint8_t* to = expected.data() + i * stride;
            for (int h = 0; h < Tiles::kHeads; ++h, to += row_bytes(t.shape.codec, t.shape.head_dim))
                tile_get_row(t.head(h), t.tile(t.cells[i], h), static_cast<int>(t.cells[i] % kTileKeys), to);
        }
        Backwards executor;
        get_rows(k(), executor, t.view(), t.cells, rows.data(), stride);
        ASSERT_EQ(rows, expected);
        // Into other bytes: what is not written stays.
        Tiles other = t, by_definition = t;
        SplitMix64 random(5);
        for (std::size_t i = 0; i < other.bytes.size(); ++i)
            other.bytes[i] = by_definition.bytes[i] = static_cast<std::uint8_t>(random.bits());
        set_rows(k(), executor, other.view(), other.cells, rows.data(), stride);
        for (std::size_t i = 0; i < t.cells.size(); ++i) {
            const std::uint8_t* from = rows.data() + i * stride;
            for (int h = 0; h < Tiles::kHeads; ++h, from += row_bytes(t.shape.codec, t.shape.head_dim))
                tile_set_row(t.head(h), by_definition.tile(t.cells[i], h), static_cast<int>(t.cells[i] % kTileKeys), from);
        }
        ASSERT_EQ(other.bytes, by_definition.bytes);
    });
}

/// Vector of a cell in the model's space, by the specification.
std::vector<float> decoded(Tiles& t, std::int64_t cell, int h) {
    std::vector<float> y(t.shape.head_dim);
    tile_decode_rotated(t.head(h), t.tile(cell, h), static_cast<int>(cell % kTileKeys), y);
    if (codec_info(t.head(h).codec).rotated) rotation_for(t.shape.head_dim).inverse(y);
    return y;
}

double distance(std::span<const float> a, std::span<const float> b) {
    double e = 0, n = 0;
    for (std::size_t i = 0; i < a.size(); ++i) e += std::pow(a[i] - b[i], 2), n += std::pow(b[i], 2);
    return std::sqrt(e / std::max(n, 1e-30));
}

TEST_P(Rows, AreDecodedIntoTheModelsSpace) {
    for_each([&](Tiles& t) {
        const int d = t.shape.head_dim;
        const std::size_t stride = 2 * d + 1;
        std::vector<float> x(t.cells.size() * stride, 7);
        std::vector<std::uint16_t> halves(x.size());
        DecodedRows out;
        out.x = x.data(), out.halves = halves.data(), out.stride = stride;
        Backwards executor;
        decode_rows(k(), executor, t.view(), t.cells, out);
        for (std::size_t i = 0; i < t.cells.size(); ++i) {
            EXPECT_EQ(x[i * stride + 2 * d], 7) << "written beyond the row";
            for (int h = 0; h < Tiles::kHeads; ++h) {
                const std::span<const float> got(x.data() + i * stride + h * d, d);
                // The kernels decode trellis levels as the attention does, in steps of 1/127 of the largest.
                const bool steps = codec_info(t.head(h).codec).family == Family::trellis;
                ASSERT_LT(distance(got, decoded(t, t.cells[i], h)), steps ? 6e-3 : 1e-5) << i << " head " << h;
                for (int j = 0; j < d; ++j) ASSERT_EQ(halves[i * stride + h * d + j], to_half(got[j]));
            }
        }
    });
}

TEST_P(Rows, AreRotatedInTheModelsSpace) {
    for_each([&](Tiles& t) {
        const int d = t.shape.head_dim;
        for (const bool adjacent : {true, false}) {
            const PairTurn pairs{d / 4, d / 2, adjacent};
            std::vector<float> tables[2];
            for (int i = 0; i < d / 4; ++i)
                for (int k = 0; k < 2; ++k) tables[k].insert(tables[k].end(), {std::cos(0.3f * i + k), std::sin(0.3f * i + k)});
            Tiles turned = t;
            std::vector<const float*> by_row;
            for (std::size_t i = 0; i < t.cells.size(); ++i) by_row.push_back(tables[i % 2].data());
            Backwards executor;
            ASSERT_TRUE(rotate_rows(k(), executor, turned.view(), turned.cells, pairs, by_row, NormMode::corrected));
            double error = 0, by_definition = 0;
            Tiles spec = t;
            for (std::size_t i = 0; i < t.cells.size(); i += 6)
                for (int h = 0; h < Tiles::kHeads; ++h) {
                    std::vector<float> x = decoded(t, t.cells[i], h);
                    for (int p = 0; p < d / 4; ++p) {
                        const int a = d / 4 + (adjacent ? 2 * p : p), b = a + (adjacent ? 1 : d / 4);
                        const float u = x[a], v = x[b], c = by_row[i][2 * p], s = by_row[i][2 * p + 1];
                        x[a] = u * c - v * s, x[b] = u * s + v * c;
                    }
                    tile_encode(t.head(h), spec.tile(t.cells[i], h), static_cast<int>(t.cells[i] % kTileKeys), x);
                    error += distance(decoded(turned, t.cells[i], h), x), by_definition += distance(decoded(spec, t.cells[i], h), x);
                }
            EXPECT_NEAR(error / by_definition, 1, 0.03);
        }
    });
}

INSTANTIATE_TEST_SUITE_P(All, Rows, testing::Combine(testing::ValuesIn(levels()), testing::ValuesIn([] {
                                                         std::vector<CodecId> ids;
                                                         for (const CodecInfo& c : kCodecs)
                                                             if (!is_composite(c.id)) ids.push_back(c.id);
                                                         return ids;
                                                     }())),
                         [](const auto& i) {
                             return std::string(simd_level_name(std::get<0>(i.param))) + "_" +
                                    std::string(codec_info(std::get<1>(i.param)).name);
                         });

}  // namespace
}  // namespace turboquant::test
