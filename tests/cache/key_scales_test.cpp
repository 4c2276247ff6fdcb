// Keys with scaled channels, in the cache.
#include <gtest/gtest.h>

#include "key_cache.h"
#include "turboquant/attention/turns.h"
#include "turboquant/cache/key_offset.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

class KeyScales : public OverStores {};
TQ_OVER_STORES(KeyScales);

/// Scales of all channels, alike in each pair (2i, 2i+1).
std::string some_scales(int seed) {
    std::string letters;
    for (int i = 0; i < kEmbd; i++) letters += "WYZacei"[(i / 2 * 5 + seed) % 7];
    return letters;
}

}  // namespace

TEST_P(KeyScales, KeepTheScores) {
    const auto pos = iota32(200);
    const auto x = biased_keys(pos, some_bias(), 15);
    Cache plain(CodecId::turbo8), scaled(CodecId::turbo8, true, some_scales(0));
    ASSERT_TRUE(plain.write(x, iota64(200), pos));
    ASSERT_TRUE(scaled.write(x, iota64(200), pos));
    EXPECT_LT(scaled.error(x, 0, 200), 6 * plain.error(x, 0, 200)) << "scales are undone when a row is read";
    EXPECT_GT(scaled.error(x, 0, 200), 1.2 * plain.error(x, 0, 200)) << "but they are there";
    // What is stored, and what the score term gives back, with queries scaled the other way.
    const KeyOffset& offset = *scaled.kv->offset();
    EXPECT_NO_THROW(offset.check_scales());
    const int n = offset.n_freq(), id = scaled.cells.offset_id(0);
    ASSERT_FALSE(offset.mu(id).empty()) << "of a store that measured it: fetched now";
    const KeyTransform keys = offset.transform(scaled.cells);
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    std::vector<float> q(kDim), scaled_q(kDim), terms(2 * n), turn(2 * turn_width(n)), rows(200 * kEmbd);
    scaled.kv->store().read(serial(), 0, 200, rows.data());
    for (int j = 0; j < 200; j += 7)
        for (int h = 0; h < kHeads; h++) {
            for (float& v : q) v = normal(rng);
            for (int i = 0; i < kDim; i++) scaled_q[i] = q[i] / offset.scales(h)[i];
            query_terms(keys.rope, kDim, keys.mu[id] + 2 * h * kDim, scaled_q.data(), terms.data());
            turn_row(offset.turns(), n, j, turn.data());
            const float* row = rows.data() + j * kEmbd + h * kDim;
            double exact = 0, got = 0, norm = 0;
            for (int i = 0; i < kDim; i++) exact += q[i] * x[j * kEmbd + h * kDim + i], got += scaled_q[i] * row[i], norm += q[i] * q[i];
            for (int i = 0; i < n; i++) got += terms[i] * turn[i] + terms[n + i] * turn[turn_width(n) + i];
            EXPECT_NEAR(got, exact, 0.15 * std::sqrt(norm)) << "row " << j << " head " << h;
        }
}

TEST_P(KeyScales, StateIsLosslessAndForTheSameScalesOnly) {
    for (const CodecInfo& codec : kCodecs) {
        if (!codec.rotated) continue;
        const auto x = biased_keys(iota32(300), some_bias(), 16);
        Cache a(codec.id, true, some_scales(0)), b(codec.id, true, some_scales(0)), other(codec.id, true, some_scales(1)), plain(codec.id);
        Cache coarse(CodecId::turbo6, true, some_scales(0)), none(codec.id, false);
        ASSERT_TRUE(a.write(x, iota64(300), iota32(300)));
        const auto saved = a.save(0, 300);
        ASSERT_EQ(b.kv.restore_rows(64, 300, saved.data(), b.cells, true), RestoreResult::ok);
        std::vector<float> before(kEmbd), after(kEmbd);
        for (int i = 0; i < 300; i++) {
            a.kv->read_row(i, a.cells, before), b.kv->read_row(64 + i, b.cells, after);
            ASSERT_EQ(before, after) << codec.name << " row " << i;
        }
        for (Cache* c : {&other, &plain, &none})
            EXPECT_EQ(c->kv.restore_rows(64, 300, saved.data(), c->cells, true), RestoreResult::scales_differ) << codec.name;
        if (codec.id != CodecId::turbo6) {
            ASSERT_EQ(coarse.kv.restore_rows(64, 300, saved.data(), coarse.cells, true), RestoreResult::ok);
            EXPECT_LT(coarse.error(x, 64, 300), 0.02 + 3 * a.error(x, 0, 300)) << codec.name;
        }
        // And unscaled keys into a scaled cache.
        Cache from(CodecId::turbo8), to(codec.id, true, some_scales(0));
        ASSERT_TRUE(from.write(x, iota64(300), iota32(300)));
        const auto unscaled = from.save(0, 300);
        ASSERT_EQ(to.kv.restore_rows(0, 300, unscaled.data(), to.cells, true), RestoreResult::ok);
        EXPECT_LT(to.error(x, 0, 300), 0.01 + 1.5 * a.error(x, 0, 300)) << codec.name;
    }
}

TEST_P(KeyScales, Shift) {
    const auto x = biased_keys(iota32(100), some_bias(), 17);
    Cache c(CodecId::turbo8, true, some_scales(2));
    ASSERT_TRUE(c.write(x, iota64(100), iota32(100)));
    std::vector<float> table(kDim), expected = x;
    rope_table(rope(), -30, table);
    std::vector<std::int32_t> delta(2 * 512);
    for (int row = 40; row < 100; row++) {
        delta[row] = -30;
        for (int h = 0; h < kHeads; h++) rope_apply(rope(), table, std::span(expected).subspan(row * kEmbd + h * kDim, kDim));
    }
    c.kv->rotate(serial(), rope(), delta);
    std::uint64_t generation = 0;
    c.cells.shift(delta, generation);
    EXPECT_LT(c.error(expected, 0, 100), 0.002);
}

TEST_P(KeyScales, ThoseThatDoNotFitAreRefused) {
    KeyOffset offset(kHeads, kDim);
    EXPECT_THROW(offset.set_scales(some_scales(0).substr(1)), std::invalid_argument);
    std::string uneven = some_scales(0);
    uneven[6] = 'z';
    offset.set_scales(uneven);
    EXPECT_THROW(offset.check_scales(), std::invalid_argument) << "no RoPE";
    offset.set_rope(rope());
    EXPECT_THROW(offset.check_scales(), std::invalid_argument) << "channels 6 and 7 are a pair";
    offset.set_scales(some_scales(0));
    EXPECT_NO_THROW(offset.check_scales());
}

// Formats per head, an offset and scales, saved and restored in one.
TEST_P(KeyScales, AndFormatsPerHead) {
    const HeadCodecs codecs({CodecId::tcq3, CodecId::turbo8});
    const auto x = biased_keys(iota32(300), some_bias(), 18);
    Cache a(codecs, true, some_scales(0)), b(codecs, true, some_scales(0)),
        other(HeadCodecs({CodecId::turbo8, CodecId::tcq3}), true, some_scales(0));
    ASSERT_TRUE(a.write(x, iota64(300), iota32(300)));
    const auto saved = a.save(0, 300);
    ASSERT_EQ(b.kv.restore_rows(64, 300, saved.data(), b.cells, true), RestoreResult::ok);
    ASSERT_EQ(other.kv.restore_rows(64, 300, saved.data(), other.cells, true), RestoreResult::ok);
    std::vector<float> before(kEmbd), after(kEmbd);
    for (int i = 0; i < 300; i++) {
        a.kv->read_row(i, a.cells, before), b.kv->read_row(64 + i, b.cells, after);
        ASSERT_EQ(before, after) << "row " << i;
    }
    EXPECT_GT(a.error(x, 0, 300), 0.01) << "half of a keys' error at 3 bits";
    EXPECT_LT(other.error(x, 64, 300), 2.5 * a.error(x, 0, 300)) << "both heads at 3 bits";
    EXPECT_GT(other.error(x, 64, 300), 1.5 * a.error(x, 0, 300));
}
