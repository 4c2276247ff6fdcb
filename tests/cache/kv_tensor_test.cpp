#include "turboquant/cache/kv_tensor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "tests/cache/stores.h"
#include "turboquant/codec/half.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

CellPositions none(4096, 4);  // no cell has a position, and none gets one: plain rows

class KvTensors : public OverStores {};
TQ_OVER_STORES(KvTensors);

std::vector<float> gaussian(std::size_t n, unsigned seed, float sigma = 1) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0, sigma);
    std::vector<float> x(n);
    for (float& v : x) v = normal(rng);
    return x;
}

void encode_rows(KvTensor& kv, const std::vector<float>& x, const std::vector<std::int64_t>& rows) {
    ASSERT_TRUE(kv.encode_rows(serial(), {x.data(), kv.layout().n_embd(), rows, {}, {}}));
}

}  // namespace

// The promise behind saved state: reading a row as fp16 and writing it back gives the same bytes, wherever it is written.
TEST_P(KvTensors, SavedRowsAreLossless) {
    for (const CodecInfo& c : kCodecs)
        for (const Side side : {Side::key, Side::value})
            for (const int d : kHeadDims) {
                if (is_composite(c.id) || !serves(c.id, d)) continue;  // composites are saved decoded, in fp16: outliers_test.cpp
                const KvGeometry g{side, c.id, NormMode::corrected, 2 * d, 128, 2};
                HeldTensor h(g, d);
                const std::vector<std::int64_t> rows = {0, 1, 63, 64, 127, 128, 200, 255};
                encode_rows(*h, gaussian(rows.size() * g.n_embd, 7 * d + static_cast<int>(side), 3), rows);
                std::vector<std::uint16_t> saved(g.n_embd), again(g.n_embd);
                for (const std::int64_t row : rows) {
                    h.save_row(row, none, saved);
                    ASSERT_EQ(h.restore_rows(9, 1, saved.data(), none, true), RestoreResult::ok);
                    h.save_row(9, none, again);
                    EXPECT_EQ(saved, again) << c.name << " d=" << d << " row " << row;
                }
            }
}

TEST_P(KvTensors, HeadsOfDifferentFormats) {
    const HeadCodecs codecs({CodecId::tcq2, CodecId::turbo8, CodecId::turbo4});
    for (const Side side : {Side::key, Side::value}) {
        const KvGeometry g{side, codecs, NormMode::corrected, 3 * 64, 200, 2};
        HeldTensor h(g, 64);
        std::size_t bytes = 0;
        for (int i = 0; i < 3; i++) bytes += tile_bytes({codecs.of(i), side, 64});
        EXPECT_EQ(h->format_bytes(), 2 * 4 * bytes) << "streams, tiles";
        EXPECT_EQ(reserved_bytes(g), h->format_bytes());
        std::vector<std::int64_t> rows(400);
        for (int i = 0; i < 400; i++) rows[i] = (i * 77) % 400;
        const auto x = gaussian(rows.size() * 192, 3);
        encode_rows(*h, x, rows);
        // Each head has its format's error; bounds on both sides, about a tenth apart.
        const double low[] = {.065, 3e-5, .0088}, high[] = {.09, 6e-5, .0098};
        double error[3] = {}, energy[3] = {};
        std::vector<float> out(192);
        for (int i = 0; i < 400; i++) {
            h->read_row(rows[i], none, out);
            for (int j = 0; j < 192; j++) {
                const double e = out[j] - x[i * 192 + j];
                error[j / 64] += e * e, energy[j / 64] += x[i * 192 + j] * x[i * 192 + j];
            }
        }
        for (int i = 0; i < 3; i++) {
            EXPECT_GT(error[i] / energy[i], low[i]) << i;
            EXPECT_LT(error[i] / energy[i], high[i]) << i;
        }
        // Saved rows come back bit for bit, here and in a copied stream.
        HeldTensor other(g, 64);
        std::vector<std::uint16_t> saved(192), again(192);
        for (const std::int64_t row : {0, 63, 64, 199, 200, 399}) {
            h.save_row(row, none, saved);
            ASSERT_EQ(other.restore_rows(row % 200, 1, saved.data(), none, true), RestoreResult::ok);
            other->copy_stream(0, 1);
            other.save_row(200 + row % 200, none, again);
            EXPECT_EQ(saved, again) << row;
        }
        // Into another format they go decoded.
        HeldTensor uniform(KvGeometry{side, CodecId::turbo8, NormMode::corrected, 192, 200, 2}, 64);
        h.save_row(5, none, saved);
        ASSERT_EQ(uniform.restore_rows(7, 1, saved.data(), none, true), RestoreResult::ok);
        std::vector<float> a(192), b(192);
        h->read_row(5, none, a), uniform->read_row(7, none, b);
        for (int j = 0; j < 192; j++) EXPECT_NEAR(a[j], b[j], .1);
    }
    const KvGeometry four{Side::key, codecs, NormMode::corrected, 4 * 64, 200, 2};
    EXPECT_THROW(HeldTensor(four, 64), std::invalid_argument) << "three formats, four heads";
}

TEST_P(KvTensors, RowsDoNotDisturbEachOther) {
    const KvGeometry g{Side::value, CodecId::turbo3, NormMode::corrected, 256, 192, 1};
    HeldTensor h(g, 64);
    std::vector<std::int64_t> rows(192);
    for (int i = 0; i < 192; i++) rows[i] = (i * 77) % 192;
    const auto x = gaussian(192 * 256, 3);
    encode_rows(*h, x, rows);
    std::vector<float> out(256);
    double error = 0, energy = 0;
    for (int i = 0; i < 192; i++) {
        h->read_row(rows[i], none, out);
        for (int j = 0; j < 256; j++) {
            const double e = out[j] - x[i * 256 + j];
            error += e * e, energy += x[i * 256 + j] * x[i * 256 + j];
        }
    }
    EXPECT_GT(error / energy, 0.032);
    EXPECT_LT(error / energy, 0.036);
}

TEST_P(KvTensors, CopyStreamAndZeroCells) {
    const KvGeometry g{Side::key, CodecId::turbo4, NormMode::corrected, 128, 100, 3};  // cells not a multiple of a tile
    HeldTensor h(g, 64);
    encode_rows(*h, gaussian(2 * 128, 5), {1, 99});
    h->copy_stream(0, 2);
    std::vector<std::uint16_t> a(128), b(128);
    for (const int cell : {1, 99}) {
        h.save_row(cell, none, a), h.save_row(200 + cell, none, b);
        EXPECT_EQ(a, b);
    }
    std::vector<float> x(128);
    h->read_row(150, none, x);
    for (const auto v : x) EXPECT_EQ(v, 0) << "cells never written read as zero";
}

TEST_P(KvTensors, ShiftedKeysAreTheKeysOfTheNewPosition) {
    RopeParams rope;
    rope.n_dims = 128;
    std::vector<float> table(128);
    const KvGeometry g{Side::key, CodecId::turbo8, NormMode::corrected, 128, 64, 1};
    HeldTensor h(g, 128);
    auto key = gaussian(128, 11);
    auto at100 = key, at60 = key;
    rope_table(rope, 100, table), rope_apply(rope, table, at100);
    rope_table(rope, 60, table), rope_apply(rope, table, at60);
    encode_rows(*h, at100, {5});
    std::vector<std::int32_t> shift(64);
    shift[5] = -40;
    h->rotate(serial(), rope, shift);
    std::vector<float> out(128);
    h->read_row(5, none, out);
    double error = 0, energy = 0, unshifted = 0;
    for (int i = 0; i < 128; i++) {
        error += std::pow(out[i] - at60[i], 2), energy += std::pow(at60[i], 2), unshifted += std::pow(at100[i] - at60[i], 2);
    }
    EXPECT_LT(error / energy, 3e-4);
    EXPECT_GT(unshifted / energy, 0.1) << "the test would not notice a missing rotation";
}

TEST_P(KvTensors, RefusesHeadSizes) {
    const KvGeometry g{Side::key, CodecId::turbo4, NormMode::corrected, 120, 64, 1};
    HeldTensor kv(g);
    EXPECT_GE(reserved_bytes(g), 64u * 120 * 2);
    EXPECT_THROW(kv->bind_head_dim(40), std::invalid_argument);
    EXPECT_THROW(kv->bind_head_dim(64), std::invalid_argument) << "does not divide the row";
    const KvGeometry g2{Side::key, CodecId::turbo4, NormMode::corrected, 256, 64, 1};
    HeldTensor kv2(g2);
    kv2->bind_head_dim(64);
    EXPECT_NO_THROW(kv2->bind_head_dim(64));
    EXPECT_THROW(kv2->bind_head_dim(128), std::invalid_argument);
    EXPECT_EQ(kv2->format_bytes(), 64u * 256 * 4 / 8 + 64 * 4 * 2);
}

TEST_P(KvTensors, NonFiniteRowsAreRefused) {
    const KvGeometry g{Side::key, CodecId::turbo4, NormMode::corrected, 64, 64, 1};
    HeldTensor h(g, 64);
    std::vector<std::uint16_t> row(64, to_half(1.0f));
    row[3] = 0x7e00;
    EXPECT_EQ(h.restore_rows(0, 1, row.data(), none, true), RestoreResult::damaged);
    std::vector<float> x(64);
    h->read_row(0, none, x);
    for (const auto v : x) EXPECT_EQ(v, 0);
}

TEST_P(KvTensors, SavedRowsOfAnotherFormatAreEncodedAnew) {
    const KvGeometry g4{Side::value, CodecId::turbo4, NormMode::corrected, 256, 64, 1},
        g3{Side::value, CodecId::turbo3, NormMode::corrected, 256, 64, 1};
    HeldTensor a(g4, 128), b(g3, 128);
    const auto x = gaussian(256, 21);
    encode_rows(*a, x, {3});
    std::vector<std::uint16_t> saved(256);
    a.save_row(3, none, saved);
    ASSERT_EQ(b.restore_rows(7, 1, saved.data(), none, true), RestoreResult::ok);
    std::vector<float> y(256);
    b->read_row(7, none, y);
    double error = 0, energy = 0;
    for (int i = 0; i < 256; i++) error += std::pow(y[i] - x[i], 2), energy += x[i] * x[i];
    EXPECT_GT(error / energy, 0.03);
    EXPECT_LT(error / energy, 0.06) << "the errors of both formats";
}

// Any bytes may come out of a state file: a row that is refused reads as zeros, one that is taken reads as numbers, and other rows stay.
TEST_P(KvTensors, RestoringRandomBytesDoesNoHarm) {
    std::mt19937 rng(99);
    for (const CodecInfo& c : kCodecs) {
        if (!serves(c.id, 64)) continue;
        SCOPED_TRACE(c.name);
        const KvGeometry g{Side::key, c.id, NormMode::corrected, 128, 128, 1};
        CellPositions cells(128, 1);
        HeldTensor h(g, 64);
        if (c.rotated) h->enable_offset();
        std::vector<std::int64_t> beside(FirstRows::kFreezeRows);  // so many that outlier channels stay as they are
        std::iota(beside.begin(), beside.end(), 4);
        encode_rows(*h, gaussian(beside.size() * 128, 5), beside);
        const auto read_beside = [&] {
            std::vector<float> out(beside.size() * 128);
            for (std::size_t i = 0; i < beside.size(); i++) h->read_row(beside[i], cells, std::span(out).subspan(128 * i, 128));
            return out;
        };
        const std::vector<float> before = read_beside();
        std::vector<float> x(128);
        int refused = 0;
        for (int trial = 0; trial < 300; trial++) {
            std::vector<std::uint16_t> rows(4 * 128);
            for (auto& v : rows) v = static_cast<std::uint16_t>(rng());
            if (trial % 2) {  // a good header on bad contents
                h.save_row(4, cells, std::span(rows).first(128));
                rows[1 + rng() % 127] ^= static_cast<std::uint16_t>(1 << rng() % 16);
            }
            const RestoreResult result = h.restore_rows(0, 4, rows.data(), cells, true);
            for (int row = 0; row < 4; row++) {
                h->read_row(row, cells, x);
                for (const float v : x) ASSERT_TRUE(std::isfinite(v)) << "trial " << trial << " row " << row;
                const auto saved = std::span(rows).subspan(128 * row, 128);
                if (row == 0 || std::ranges::all_of(saved, [](std::uint16_t v) { return std::isfinite(from_half(v)); })) continue;
                ASSERT_TRUE(std::ranges::all_of(x, [](float v) { return v == 0; })) << "trial " << trial << " row " << row;
                ASSERT_NE(result, RestoreResult::ok) << trial;
                refused++;
            }
        }
        EXPECT_GT(refused, 800) << "most rows of random halves hold one that is not finite";
        EXPECT_EQ(read_beside(), before);
    }
}
