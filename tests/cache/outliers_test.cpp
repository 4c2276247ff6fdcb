// Formats with outlier channels in a KV tensor: measured on the first rows, then frozen; and what composites do with saved state.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "tests/cache/stores.h"
#include "turboquant/codec/random.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

constexpr int kHeads = 2, kDim = 64, kEmbd = kHeads * kDim;
constexpr int kOutliers[kHeads][4] = {{3, 17, 40, 63}, {0, 5, 31, 32}};

// Unit variance, but outlier channels of 20 times that.
std::vector<float> rows_with_outliers(int n, std::uint64_t seed) {
    SplitMix64 random(seed);
    std::vector<float> x(static_cast<std::size_t>(n) * kEmbd);
    for (float& v : x) v = static_cast<float>(random.normal());
    for (int i = 0; i < n; i++)
        for (int h = 0; h < kHeads; h++)
            for (const int c : kOutliers[h]) x[i * kEmbd + h * kDim + c] *= 20;
    return x;
}

template <class T>
std::vector<T> iota(int n, int first = 0) {
    std::vector<T> v(n);
    std::iota(v.begin(), v.end(), static_cast<T>(first));
    return v;
}

class OutlierCache : public OverStores {};
TQ_OVER_CPU_STORES(OutlierCache);

struct Cache {
    explicit Cache(CodecId codec, Side side = Side::value, float ratio = kOutlierRatio)
        : kv({side, codec, NormMode::corrected, kEmbd, 320, 2, ratio}, kDim) {}
    bool write(const std::vector<float>& x, int first_row, int n, int first_x = 0) {
        return kv->encode_rows(serial(), {x.data() + first_x * kEmbd, kEmbd, iota<std::int64_t>(n, first_row), {}, {}});
    }
    // Mean squared error a value against x.
    double error(const std::vector<float>& x, int first_row, int n) const {
        std::vector<float> out(kEmbd);
        double e = 0;
        for (int i = 0; i < n; i++) {
            kv->read_row(first_row + i, cells, out);
            for (int j = 0; j < kEmbd; j++) e += std::pow(out[j] - x[i * kEmbd + j], 2);
        }
        return e / (n * kEmbd);
    }
    CellPositions cells{320, 2};
    HeldTensor kv;
};

}  // namespace

TEST(Outliers, ChannelsAreFoundPerHead) {
    OutlierChannels o(CodecId::outlier3, kHeads, kDim, 3);
    EXPECT_EQ(o.count(), 0);
    o.measure(rows_with_outliers(100, 1));
    ASSERT_EQ(o.count(), 4);
    for (int h = 0; h < kHeads; h++)
        for (int i = 0; i < kDim; i++)
            EXPECT_EQ(o.mask(h)[i], std::count(std::begin(kOutliers[h]), std::end(kOutliers[h]), i)) << h << " " << i;
    OutlierChannels strict(CodecId::outlier3, kHeads, kDim, 30), lax(CodecId::outlier3, kHeads, kDim, 1);
    strict.measure(rows_with_outliers(100, 1));
    lax.measure(rows_with_outliers(100, 1));
    EXPECT_EQ(strict.count(), 0);
    EXPECT_GT(lax.count(), 20);
    EXPECT_LE(lax.count(), kDim / 2);
    OutlierChannels fixed(CodecId::split3_4, kHeads, kDim, 3);
    EXPECT_EQ(fixed.count(), kDim / 4);
    fixed.measure(rows_with_outliers(100, 1));
    EXPECT_EQ(fixed.count(), kDim / 4);
    for (const int c : kOutliers[1]) EXPECT_EQ(fixed.mask(1)[c], 1);
}

TEST(Outliers, HeadsShareTheirMeanNumber) {
    OutlierChannels o(CodecId::outlier3, kHeads, kDim, 3);
    std::vector<float> x(kEmbd, 1.0f);
    for (const int c : {1, 2, 3, 4, 5}) x[c] = 10;  // five of head 0, none of head 1
    o.measure(x);
    EXPECT_EQ(o.count(), 2);
    EXPECT_EQ(std::accumulate(o.mask(0).begin(), o.mask(0).end(), 0), 2);
    EXPECT_EQ(std::accumulate(o.mask(1).begin(), o.mask(1).end(), 0), 2);
}

TEST_P(OutlierCache, EightBitsForFewChannelsSaveTheRest) {
    const auto x = rows_with_outliers(200, 2);
    Cache plain(CodecId::turbo3), outliers(CodecId::outlier3);
    ASSERT_TRUE(plain.write(x, 0, 200));
    ASSERT_TRUE(outliers.write(x, 0, 200));
    EXPECT_FALSE(outliers.kv->measuring());
    // The rest has variance 1, of which 3 bits leave .0335; 8-bit outliers add little. Without them 26 times the energy is quantized.
    EXPECT_GT(outliers.error(x, 0, 200), 0.030);
    EXPECT_LT(outliers.error(x, 0, 200), 0.040);
    EXPECT_GT(plain.error(x, 0, 200), 20 * outliers.error(x, 0, 200));
    EXPECT_DOUBLE_EQ(8.0 * outliers.kv->format_bytes() / (640 * kEmbd), 3 + 5 * 4 / 64.0 + 24 / 64.0 + 1 / 64.0);
}

// Token by token, the number of outlier channels and so the layout changes while rows are there already.
TEST_P(OutlierCache, TokenByTokenEndsAsABatch) {
    auto x = rows_with_outliers(64, 3);
    for (int i = 0; i < 10; i++)  // the first tokens do not show them
        for (int h = 0; h < kHeads; h++)
            for (const int c : kOutliers[h]) x[i * kEmbd + h * kDim + c] /= 20;
    for (const CodecId id : {CodecId::outlier3, CodecId::split2_4}) {
        Cache batch(id), tokens(id);
        ASSERT_TRUE(batch.write(x, 0, 64));
        int changes = 0, count = -1;
        for (int i = 0; i < 64; i++) {
            ASSERT_TRUE(tokens.write(x, i, 1, i));
            changes += tokens.kv->outliers()->count() != count;
            count = tokens.kv->outliers()->count();
            ASSERT_EQ(tokens.kv->measuring(), i < 63);
        }
        EXPECT_EQ(changes > 1, id == CodecId::outlier3) << "the test does not see the layout change";
        // The batch came in float, the tokens were kept in fp16.
        EXPECT_NEAR(tokens.error(x, 0, 64) / batch.error(x, 0, 64), 1, 0.01);
        std::vector<float> a(kEmbd);
        batch.kv->read_row(64, batch.cells, a);
        EXPECT_EQ(a, std::vector<float>(kEmbd)) << "cells never written read as zero";
        tokens.kv->read_row(64, batch.cells, a);
        EXPECT_EQ(a, std::vector<float>(kEmbd)) << "left over from an earlier layout";
    }
}

TEST_P(OutlierCache, FrozenUntilReset) {
    const auto x = rows_with_outliers(100, 4);
    std::vector<float> other(100 * kEmbd);
    for (std::size_t i = 0; i < other.size(); i++) other[i] = x[i ^ 1];
    Cache c(CodecId::outlier3);
    ASSERT_TRUE(c.write(x, 0, 100));
    ASSERT_TRUE(c.write(other, 100, 100));
    EXPECT_EQ(c.kv->outliers()->mask(0)[3], 1);
    EXPECT_LT(c.error(x, 0, 100), 0.04);
    EXPECT_GT(c.error(other, 100, 100), 0.1) << "these have other outliers";
    c.kv.clear();
    ASSERT_TRUE(c.write(other, 0, 100));
    EXPECT_LT(c.error(other, 0, 100), 0.04);
}

TEST_P(OutlierCache, StreamsAreCopied) {
    const auto x = rows_with_outliers(100, 5);
    Cache c(CodecId::outlier3);
    ASSERT_TRUE(c.write(x, 0, 40));
    c.kv->freeze();
    c.kv->copy_stream(0, 1);
    EXPECT_FALSE(c.kv->measuring());
    EXPECT_EQ(c.error(x, 0, 40), c.error(x, 320, 40));
}

// Composites are saved decoded, as fp16. Restored into the same cache nothing changes but for ties; an empty one measures again on what it
// gets.
TEST_P(OutlierCache, SavedRowsComeBack) {
    const auto x = rows_with_outliers(150, 6);
    for (const CodecInfo& info : kCodecs) {
        if (!is_composite(info.id)) continue;
        for (const Side side : {Side::key, Side::value})
            for (const int n : {20, 150}) {
                Cache a(info.id, side), b(info.id, side);
                ASSERT_TRUE(a.write(x, 0, n));
                std::vector<std::uint16_t> saved(n * kEmbd);
                for (int i = 0; i < n; i++) a.kv.save_row(i, a.cells, std::span(saved).subspan(i * kEmbd, kEmbd));
                std::vector<float> before(kEmbd), after(kEmbd), restored(kEmbd);
                double same = 0, other = 0, energy = 0;
                for (Cache* c : {&a, &b}) ASSERT_EQ(c->kv.restore_rows(150, n, saved.data(), c->cells, false), RestoreResult::ok);
                for (int i = 0; i < n; i++) {
                    a.kv->read_row(i, a.cells, before);
                    a.kv->read_row(150 + i, a.cells, after);
                    b.kv->read_row(150 + i, b.cells, restored);
                    for (int j = 0; j < kEmbd; j++) {
                        same += std::pow(after[j] - before[j], 2), other += std::pow(restored[j] - before[j], 2),
                            energy += std::pow(before[j], 2);
                    }
                }
                if (info.family == Family::prod) continue;  // its sketch is drawn anew from the decoded vector
                EXPECT_LT(same / energy, n == 20 ? 1e-5 : 1e-4) << info.name << " n=" << n;
                EXPECT_LT(other / energy, 0.1) << info.name;
            }
    }
}
