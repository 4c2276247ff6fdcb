#include "turboquant/cache/kv_tensor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>

using namespace turboquant;

namespace {

CellPositions none(4096, 4);  // no cell has a position: plain rows

struct Held {
    std::unique_ptr<std::uint8_t, decltype(&std::free)> memory{nullptr, &std::free};
    std::unique_ptr<KvTensor> kv;
};

Held make(const KvTensor::Geometry& g, int head_dim) {
    const std::size_t bytes = (KvTensor::reserved_bytes(g) + 63) / 64 * 64;
    Held h;
    h.memory.reset(static_cast<std::uint8_t*>(std::aligned_alloc(64, bytes)));
    std::fill_n(h.memory.get(), bytes, std::uint8_t{0});
    h.kv = std::make_unique<KvTensor>(g, h.memory.get());
    h.kv->bind_head_dim(head_dim);
    return h;
}

std::vector<float> gaussian(std::size_t n, unsigned seed, float sigma = 1) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0, sigma);
    std::vector<float> x(n);
    for (float& v : x) v = normal(rng);
    return x;
}

void encode_rows(KvTensor& kv, const std::vector<float>& x, const std::vector<std::int64_t>& rows) {
    std::vector<std::int64_t> scratch(rows.size());
    for (int h = 0; h < kv.n_head(); h++)
        ASSERT_TRUE(kv.encode(kernels(), h, x.data() + h * kv.head_dim(), kv.geometry().n_embd, rows, scratch));
}

}  // namespace

// The promise behind saved state: reading a row as fp16 and writing it back gives the same bytes, wherever it is written.
TEST(KvTensor, SavedRowsAreLossless) {
    for (const CodecInfo& c : kCodecs)
        for (const Side side : {Side::key, Side::value})
            for (const int d : kHeadDims) {
                if (is_composite(c.id)) continue;  // saved decoded, in fp16: outliers_test.cpp
                const KvTensor::Geometry g{side, c.id, NormMode::corrected, 2 * d, 128, 2};
                Held h = make(g, d);
                const std::vector<std::int64_t> rows = {0, 1, 63, 64, 127, 128, 200, 255};
                encode_rows(*h.kv, gaussian(rows.size() * g.n_embd, 7 * d + static_cast<int>(side), 3), rows);
                std::vector<std::uint16_t> saved(g.n_embd), again(g.n_embd);
                for (const std::int64_t row : rows) {
                    h.kv->save_row(row, none, saved);
                    ASSERT_EQ(h.kv->restore_rows(kernels(), 9, 1, saved.data(), none, true), RestoreResult::ok);
                    h.kv->save_row(9, none, again);
                    EXPECT_EQ(saved, again) << c.name << " d=" << d << " row " << row;
                }
            }
}

TEST(KvTensor, HeadsOfDifferentFormats) {
    const HeadCodecs codecs({CodecId::tcq2, CodecId::turbo8, CodecId::turbo4});
    for (const Side side : {Side::key, Side::value}) {
        const KvTensor::Geometry g{side, codecs, NormMode::corrected, 3 * 64, 200, 2};
        Held h = make(g, 64);
        std::size_t bytes = 0;
        for (int i = 0; i < 3; i++) bytes += tile_bytes({codecs.of(i), side, 64});
        EXPECT_EQ(h.kv->format_bytes(), 2 * 4 * bytes) << "streams, tiles";
        EXPECT_EQ(KvTensor::reserved_bytes(g), h.kv->format_bytes());
        std::vector<std::int64_t> rows(400);
        for (int i = 0; i < 400; i++) rows[i] = (i * 77) % 400;
        const auto x = gaussian(rows.size() * 192, 3);
        encode_rows(*h.kv, x, rows);
        // Each head has its format's error; bounds on both sides, about a tenth apart.
        const double low[] = {.065, 3e-5, .0088}, high[] = {.09, 6e-5, .0098};
        double error[3] = {}, energy[3] = {};
        std::vector<float> out(192);
        for (int i = 0; i < 400; i++) {
            h.kv->read_row(rows[i], none, out);
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
        Held other = make(g, 64);
        std::vector<std::uint16_t> saved(192), again(192);
        for (const std::int64_t row : {0, 63, 64, 199, 200, 399}) {
            h.kv->save_row(row, none, saved);
            ASSERT_EQ(other.kv->restore_rows(kernels(), row % 200, 1, saved.data(), none, true), RestoreResult::ok);
            other.kv->copy_stream(0, 1);
            other.kv->save_row(200 + row % 200, none, again);
            EXPECT_EQ(saved, again) << row;
        }
        // Into another format they go decoded.
        Held uniform = make({side, CodecId::turbo8, NormMode::corrected, 192, 200, 2}, 64);
        h.kv->save_row(5, none, saved);
        ASSERT_EQ(uniform.kv->restore_rows(kernels(), 7, 1, saved.data(), none, true), RestoreResult::ok);
        std::vector<float> a(192), b(192);
        h.kv->read_row(5, none, a), uniform.kv->read_row(7, none, b);
        for (int j = 0; j < 192; j++) EXPECT_NEAR(a[j], b[j], .1);
    }
    const KvTensor::Geometry four{Side::key, codecs, NormMode::corrected, 4 * 64, 200, 2};
    EXPECT_THROW(make(four, 64), std::invalid_argument) << "three formats, four heads";
}

TEST(KvTensor, RowsDoNotDisturbEachOther) {
    const KvTensor::Geometry g{Side::value, CodecId::turbo3, NormMode::corrected, 256, 192, 1};
    Held h = make(g, 64);
    std::vector<std::int64_t> rows(192);
    for (int i = 0; i < 192; i++) rows[i] = (i * 77) % 192;
    const auto x = gaussian(192 * 256, 3);
    encode_rows(*h.kv, x, rows);
    std::vector<float> out(256);
    double error = 0, energy = 0;
    for (int i = 0; i < 192; i++) {
        h.kv->read_row(rows[i], none, out);
        for (int j = 0; j < 256; j++) {
            const double e = out[j] - x[i * 256 + j];
            error += e * e, energy += x[i * 256 + j] * x[i * 256 + j];
        }
    }
    EXPECT_GT(error / energy, 0.032);
    EXPECT_LT(error / energy, 0.036);
}

TEST(KvTensor, CopyStreamAndZeroCells) {
    const KvTensor::Geometry g{Side::key, CodecId::turbo4, NormMode::corrected, 128, 100, 3};  // cells not a multiple of a tile
    Held h = make(g, 64);
    encode_rows(*h.kv, gaussian(2 * 128, 5), {1, 99});
    h.kv->copy_stream(0, 2);
    std::vector<std::uint16_t> a(128), b(128);
    for (const int cell : {1, 99}) {
        h.kv->save_row(cell, none, a), h.kv->save_row(200 + cell, none, b);
        EXPECT_EQ(a, b);
    }
    std::vector<float> x(128);
    h.kv->read_row(150, none, x);
    for (const auto v : x) EXPECT_EQ(v, 0) << "cells never written read as zero";
}

TEST(KvTensor, ShiftedKeysAreTheKeysOfTheNewPosition) {
    RopeParams rope;
    rope.n_dims = 128;
    std::vector<float> table(128), shift(128);
    const KvTensor::Geometry g{Side::key, CodecId::turbo8, NormMode::corrected, 128, 64, 1};
    Held h = make(g, 128);
    auto key = gaussian(128, 11);
    auto at100 = key, at60 = key;
    rope_table(rope, 100, table), rope_apply(rope, table, at100);
    rope_table(rope, 60, table), rope_apply(rope, table, at60);
    encode_rows(*h.kv, at100, {5});
    rope_table(rope, -40, shift);
    h.kv->rotate_row(5, rope, shift);
    std::vector<float> out(128);
    h.kv->read_row(5, none, out);
    double error = 0, energy = 0, unshifted = 0;
    for (int i = 0; i < 128; i++) {
        error += std::pow(out[i] - at60[i], 2), energy += std::pow(at60[i], 2), unshifted += std::pow(at100[i] - at60[i], 2);
    }
    EXPECT_LT(error / energy, 3e-4);
    EXPECT_GT(unshifted / energy, 0.1) << "the test would not notice a missing rotation";
}

TEST(KvTensor, RefusesHeadSizes) {
    const KvTensor::Geometry g{Side::key, CodecId::turbo4, NormMode::corrected, 120, 64, 1};
    std::vector<std::uint8_t> memory(KvTensor::reserved_bytes(g));
    KvTensor kv(g, memory.data());
    EXPECT_GE(memory.size(), 64u * 120 * 2);
    EXPECT_THROW(kv.bind_head_dim(40), std::invalid_argument);
    EXPECT_THROW(kv.bind_head_dim(64), std::invalid_argument) << "does not divide the row";
    const KvTensor::Geometry g2{Side::key, CodecId::turbo4, NormMode::corrected, 256, 64, 1};
    std::vector<std::uint8_t> memory2(KvTensor::reserved_bytes(g2));
    KvTensor kv2(g2, memory2.data());
    kv2.bind_head_dim(64);
    EXPECT_NO_THROW(kv2.bind_head_dim(64));
    EXPECT_THROW(kv2.bind_head_dim(128), std::invalid_argument);
    EXPECT_EQ(kv2.format_bytes(), 64u * 256 * 4 / 8 + 64 * 4 * 2);
}

TEST(KvTensor, NonFiniteRowsAreRefused) {
    const KvTensor::Geometry g{Side::key, CodecId::turbo4, NormMode::corrected, 64, 64, 1};
    Held h = make(g, 64);
    std::vector<std::uint16_t> row(64, to_half(1.0f));
    row[3] = 0x7e00;
    EXPECT_EQ(h.kv->restore_rows(kernels(), 0, 1, row.data(), none, true), RestoreResult::not_finite);
    std::vector<float> x(64);
    h.kv->read_row(0, none, x);
    for (const auto v : x) EXPECT_EQ(v, 0);
}

TEST(KvTensor, SavedRowsOfAnotherFormatAreEncodedAnew) {
    const KvTensor::Geometry g4{Side::value, CodecId::turbo4, NormMode::corrected, 256, 64, 1},
        g3{Side::value, CodecId::turbo3, NormMode::corrected, 256, 64, 1};
    Held a = make(g4, 128), b = make(g3, 128);
    const auto x = gaussian(256, 21);
    encode_rows(*a.kv, x, {3});
    std::vector<std::uint16_t> saved(256);
    a.kv->save_row(3, none, saved);
    ASSERT_EQ(b.kv->restore_rows(kernels(), 7, 1, saved.data(), none, true), RestoreResult::ok);
    std::vector<float> y(256);
    b.kv->read_row(7, none, y);
    double error = 0, energy = 0;
    for (int i = 0; i < 256; i++) error += std::pow(y[i] - x[i], 2), energy += x[i] * x[i];
    EXPECT_GT(error / energy, 0.03);
    EXPECT_LT(error / energy, 0.06) << "the errors of both formats";
}

// Any bytes may come out of a state file.
TEST(KvTensor, RestoringRandomBytesDoesNoHarm) {
    std::mt19937 rng(99);
    for (const CodecInfo& c : kCodecs) {
        const KvTensor::Geometry g{Side::key, c.id, NormMode::corrected, 128, 64, 1};
        Held h = make(g, 64);
        if (c.rotated) h.kv->enable_offset();
        for (int trial = 0; trial < 300; trial++) {
            std::vector<std::uint16_t> rows(4 * 128);
            for (auto& v : rows) v = static_cast<std::uint16_t>(rng());
            if (trial % 2) {  // a good header on bad contents
                h.kv->save_row(0, none, std::span(rows).first(128));
                rows[1 + rng() % 127] ^= static_cast<std::uint16_t>(1 << rng() % 16);
            }
            h.kv->restore_rows(kernels(), 0, 4, rows.data(), none, true);
            std::vector<float> x(128);
            h.kv->read_row(0, none, x);
        }
    }
}
