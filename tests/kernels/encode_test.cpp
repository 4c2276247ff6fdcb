// The encoders of every level against the scalar specification, tile_encode.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "tests/kernels/support.h"
#include "turboquant/codec/rotation.h"

namespace turboquant::test {
namespace {

std::vector<SimdLevel> levels() { return {available_simd_levels().begin(), available_simd_levels().end()}; }
std::string codec_name(CodecId id) { return std::string(codec_info(id).name); }

struct Batch {
    TileShape shape;
    std::vector<float> x;
    std::vector<std::int64_t> cells;
    std::vector<std::uint8_t> tiles;
    std::size_t x_stride, tile_stride;

    // n vectors for scattered cells of `n_tiles` tiles, which hold old bytes.
    Batch(TileShape s, int n, int n_tiles, std::uint64_t seed = 3) : shape(s), x_stride(s.head_dim + 5), tile_stride(tile_bytes(s) + 64) {
        SplitMix64 random(seed);
        x.resize(n * x_stride);
        for (float& v : x) v = 3 * static_cast<float>(random.normal());
        for (int i = 0; i < n; ++i) cells.push_back((static_cast<std::int64_t>(i) * 37 + 11) % (64 * n_tiles));
        tiles.resize(n_tiles * tile_stride);
        for (std::uint8_t& b : tiles) b = static_cast<std::uint8_t>(random.bits());
    }
    std::span<const float> vector(int i) const { return {x.data() + i * x_stride, static_cast<std::size_t>(shape.head_dim)}; }
    std::uint8_t* tile(int i) { return tiles.data() + cells[i] / 64 * tile_stride; }
    int slot(int i) const { return static_cast<int>(cells[i] % 64); }

    EncodeArgs args(NormMode mode = NormMode::corrected) {
        EncodeArgs a;
        a.shape = shape, a.tiles = tiles.data(), a.tile_stride = tile_stride, a.x = x.data(), a.x_stride = x_stride;
        a.cells = cells.data(), a.n = static_cast<int>(cells.size()), a.norm_mode = mode;
        return a;
    }
    bool encode(SimdLevel level, NormMode mode = NormMode::corrected) { return turboquant::encode(kernels(level), args(mode)); }
    void encode_by_specification(NormMode mode = NormMode::corrected) {
        for (int i = 0; i < static_cast<int>(cells.size()); ++i) tile_encode(shape, tile(i), slot(i), vector(i), mode);
    }
    std::vector<std::uint8_t> row(int i) {
        std::vector<std::uint8_t> r(row_bytes(shape.codec, shape.head_dim));
        tile_get_row(shape, tile(i), slot(i), r.data());
        return r;
    }
    // Squared error of decoding vector i, in the model's space.
    double error(int i) { return error(i, *this); }
    // The same of the tiles of another batch of the same cells.
    double error(int i, Batch& other) const {
        std::vector<float> y(shape.head_dim);
        tile_decode_rotated(shape, other.tile(i), slot(i), y);
        if (codec_info(shape.codec).rotated) rotation_for(shape.head_dim).inverse(y);
        double e = 0;
        for (int d = 0; d < shape.head_dim; ++d) e += std::pow(static_cast<double>(y[d]) - vector(i)[d], 2);
        return e;
    }
};

class Encode : public testing::TestWithParam<std::tuple<SimdLevel, CodecId>> {
  protected:
    SimdLevel level() const { return std::get<0>(GetParam()); }
    CodecId codec() const { return std::get<1>(GetParam()); }
    int bits() const { return codec_info(codec()).bits; }
    // A near tie between two paths of a trellis: many codes of the vector differ, and its scale by more than a rounding; its error hardly.
    bool trellis() const { return codec_info(codec()).family == Family::trellis; }
    double scale_tolerance() const { return trellis() ? 0.03 : 0.002; }
};

TEST_P(Encode, EqualsSpecificationButForNearTies) {
    for (const Side side : {Side::key, Side::value})
        for (const int d : kHeadDims) {
            SCOPED_TRACE(std::to_string(d) + (side == Side::key ? " key" : " value"));
            Batch batch({codec(), side, d}, 100, 2), spec = batch;
            EXPECT_TRUE(batch.encode(level()));
            spec.encode_by_specification();
            int same = 0, equal_vectors = 0;
            double error = 0, spec_error = 0;
            for (int i = 0; i < 100; ++i) {
                const std::vector<std::uint8_t> a = batch.row(i), b = spec.row(i);
                equal_vectors += a == b;
                for (int k = 0; k < d; ++k) {
                    const auto bits_at = [&](const std::vector<std::uint8_t>& r) {
                        int c = 0;
                        for (int j = 0; j < bits(); ++j) c |= (r[(k * bits() + j) / 8] >> (k * bits() + j) % 8 & 1) << j;
                        return c;
                    };
                    const int ca = bits_at(a), cb = bits_at(b);
                    same += ca == cb;
                    ASSERT_LE(std::abs(ca - cb), trellis() ? 1 << bits() : 1);
                }
                error += batch.error(i), spec_error += spec.error(i);
                if (codec_info(codec()).rotated) {
                    const float sa = from_half(static_cast<std::uint16_t>(a[a.size() - 2] | a[a.size() - 1] << 8));
                    const float sb = from_half(static_cast<std::uint16_t>(b[b.size() - 2] | b[b.size() - 1] << 8));
                    EXPECT_NEAR(sa / sb, 1, scale_tolerance());
                }
            }
            if (trellis())
                EXPECT_GE(equal_vectors, 97);
            else
                EXPECT_GE(same, 0.999 * 100 * d);
            EXPECT_NEAR(error, spec_error, 1e-3 * spec_error);
        }
}

// As vectors from which the offset was taken before, in double, but for near ties.
TEST_P(Encode, RemovesTheOffset) {
    for (const int d : {64, 80, 576}) {
        SCOPED_TRACE(d);
        Batch batch({codec(), Side::key, d}, 20, 2), plain = batch;
        SplitMix64 random(5);
        std::vector<float> turns(20 * 2 * static_cast<std::size_t>(d)), offset(7 + 2 * static_cast<std::size_t>(d));
        for (float& f : turns) f = 2 * static_cast<float>(random.uniform()) - 1;
        for (float& f : offset) f = 20 * static_cast<float>(random.normal());
        std::vector<const float*> offsets(20, offset.data());
        offsets[3] = nullptr;
        for (std::size_t i = 0; i < 20; ++i)
            for (std::size_t k = 0; k < static_cast<std::size_t>(d) && i != 3; ++k) {
                const float *turn = turns.data() + i * 2 * d, *o = offset.data() + 7;
                float& x = plain.x[i * plain.x_stride + k];
                const double taken = static_cast<double>(o[k]) * turn[k] + static_cast<double>(o[d + k]) * turn[d + k];
                x = static_cast<float>(x - taken);
            }
        EncodeArgs a = batch.args();
        a.turns = turns.data(), a.offsets = offsets.data(), a.offset_at = 7;
        EXPECT_TRUE(turboquant::encode(kernels(level()), a));
        EXPECT_TRUE(plain.encode(level()));
        int equal = 0;
        double error = 0, plain_error = 0;
        for (int i = 0; i < 20; ++i) {
            equal += batch.row(i) == plain.row(i);
            error += plain.error(i, batch), plain_error += plain.error(i);
        }
        // A value near a boundary of the codebook may fall to its other side; of raw, which rounds to 11 bits, many do.
        EXPECT_GE(equal, codec() == CodecId::raw || bits() == 8 ? 0 : 14);
        EXPECT_NEAR(error, plain_error, 2e-3 * plain_error);
        EXPECT_EQ(batch.row(3), plain.row(3)) << "nothing is to be removed";
    }
}

// Only the slots of the batch change: the bytes between and around them stay.
TEST_P(Encode, OtherSlotsKeepTheirBytes) {
    for (const Side side : {Side::key, Side::value}) {
        Batch batch({codec(), side, 112}, 20, 2), old = batch;
        batch.encode(level());
        Batch probe = batch;
        probe.cells.clear();
        for (std::int64_t c = 0; c < 128; ++c)
            if (std::ranges::find(batch.cells, c) == batch.cells.end()) probe.cells.push_back(c);
        old.cells = probe.cells;
        for (std::size_t i = 0; i < probe.cells.size(); ++i)
            EXPECT_EQ(probe.row(static_cast<int>(i)), old.row(static_cast<int>(i))) << probe.cells[i];
        for (int t = 0; t < 2; ++t)
            EXPECT_EQ(std::memcmp(probe.tiles.data() + t * probe.tile_stride + tile_bytes(batch.shape),
                                  old.tiles.data() + t * probe.tile_stride + tile_bytes(batch.shape), 64),
                      0);
    }
}

TEST_P(Encode, NormModes) {
    if (!codec_info(codec()).rotated) GTEST_SKIP() << "raw has no norm";
    for (const NormMode mode : {NormMode::plain, NormMode::corrected, NormMode::eden}) {
        Batch batch({codec(), Side::value, 128}, 64, 1), spec = batch;
        batch.encode(level(), mode);
        spec.encode_by_specification(mode);
        double error = 0, spec_error = 0;
        for (int i = 0; i < 64; ++i) error += batch.error(i), spec_error += spec.error(i);
        EXPECT_NEAR(error, spec_error, 1e-3 * spec_error);
        for (int i = 0; i < 64; ++i) {
            const auto a = batch.row(i), b = spec.row(i);
            const double sa = from_half(static_cast<std::uint16_t>(a[a.size() - 2] | a[a.size() - 1] << 8));
            EXPECT_NEAR(sa / from_half(static_cast<std::uint16_t>(b[b.size() - 2] | b[b.size() - 1] << 8)), 1, scale_tolerance());
        }
    }
}

TEST_P(Encode, NonFiniteBecomesZero) {
    for (const float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(), std::nanf("")})
        for (const Side side : {Side::key, Side::value}) {
            Batch batch({codec(), side, 80}, 3, 1), spec = batch;
            batch.x[batch.x_stride + 79] = bad;
            EXPECT_FALSE(batch.encode(level()));
            std::vector<float> y(80);
            tile_decode_rotated(batch.shape, batch.tile(1), batch.slot(1), y);
            for (const float v : y) EXPECT_EQ(v, 0.0f);
            for (const int i : {0, 2}) {
                tile_encode(spec.shape, spec.tile(i), spec.slot(i), spec.vector(i));
                EXPECT_NEAR(batch.error(i), spec.error(i), 1e-2 * spec.error(i) + 1e-12);
            }
        }
}

TEST_P(Encode, ExtremeSizes) {
    const bool rotated = codec_info(codec()).rotated;
    for (const float size : {0.0f, 1e-30f, 1e-7f, 1e3f, 1e18f, 1e30f, 3e38f}) {
        Batch batch({codec(), Side::key, 96}, 1, 1), spec = batch;
        for (int d = 0; d < 96; ++d) batch.x[d] = spec.x[d] = d % 3 == 0 ? size : -size / 2;
        EXPECT_TRUE(batch.encode(level())) << size;
        spec.encode_by_specification();
        std::vector<float> a(96), b(96);
        tile_decode_rotated(batch.shape, batch.tile(0), batch.slot(0), a);
        tile_decode_rotated(spec.shape, spec.tile(0), spec.slot(0), b);
        double energy = 1e-30, difference = 0;
        for (int d = 0; d < 96; ++d)
            energy += static_cast<double>(b[d]) * b[d], difference += std::pow(static_cast<double>(a[d]) - b[d], 2);
        EXPECT_LT(difference / energy, rotated ? 1e-3 : 1e-12) << size;
    }
}

// Composites have no kernel, but the same contract: scattered cells, other slots untouched, a vector that is not finite becomes zero.
TEST(EncodeComposites, TakeTheSpecification) {
    for (const CodecInfo& c : kCodecs) {
        if (!is_composite(c.id)) continue;
        Batch batch({c.id, Side::value, 80}, 3, 2);
        std::ranges::fill(batch.tiles, std::uint8_t{0});
        Batch spec = batch;
        batch.x[batch.x_stride + 2] = std::nanf("");
        EXPECT_FALSE(batch.encode(levels().front())) << c.name;
        for (int d = 0; d < 80; ++d) spec.x[spec.x_stride + d] = 0;
        spec.encode_by_specification();
        EXPECT_EQ(batch.tiles, spec.tiles) << c.name;
    }
}

INSTANTIATE_TEST_SUITE_P(Levels, Encode, testing::Combine(testing::ValuesIn(levels()), testing::ValuesIn([] {
                                                              std::vector<CodecId> ids;
                                                              for (const CodecInfo& c : kCodecs)
                                                                  if (!is_composite(c.id)) ids.push_back(c.id);
                                                              return ids;
                                                          }())),
                         [](const auto& i) { return level_name(std::get<0>(i.param)) + "_" + codec_name(std::get<1>(i.param)); });

}  // namespace
}  // namespace turboquant::test
