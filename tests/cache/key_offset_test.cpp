#include "turboquant/cache/key_offset.h"

#include <gtest/gtest.h>

#include <cstdlib>

#include "key_cache.h"
#include "turboquant/attention/turns.h"
#include "turboquant/codec/quantizer.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

class KeyOffsetCache : public OverStores {};
TQ_OVER_STORES(KeyOffsetCache);

}  // namespace

TEST(KeyOffset, FindsTheConstantPartBeforeRope) {
    const auto bias = some_bias();
    KeyOffset offset(kHeads, kDim);
    offset.set_rope(rope());
    offset.begin(3, 1);
    const auto pos = iota32(300, 1000);
    const auto x = biased_keys(pos, bias, 1);
    EXPECT_TRUE(offset.observe(3, x.data(), kEmbd, iota64(300), pos));
    EXPECT_TRUE(offset.frozen(3));
    double error = 0;
    for (int i = 0; i < kEmbd; i++) error += std::pow(offset.mu(3)[i] - bias[i], 2) / kEmbd;
    EXPECT_LT(error, 2.0 / 64) << "the mean of 64 rows of unit variance";
    EXPECT_GT(error, 0.2 / 64);
    offset.begin(3, 2);
    EXPECT_FALSE(offset.frozen(3)) << "another sequence";
}

// What is removed is rope.h's R(p) mu, and the score term is q . R(p) mu: every kind of RoPE.
TEST(KeyOffset, TheScoreTermGivesBackWhatWasRemoved) {
    const std::vector<float> factors(kDim / 2, 3.0f);
    std::vector<RopeParams> kinds(5, rope());
    kinds[1].pairs = RopePairs::split;
    kinds[2].pairs = RopePairs::split, kinds[2].n_dims = 32, kinds[2].n_offset = 16;
    kinds[3].n_ctx_orig = 4096, kinds[3].freq_scale = 0.25f, kinds[3].ext_factor = 1;  // YaRN
    kinds[4].freq_factors = factors.data();
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    for (std::size_t kind = 0; kind <= kinds.size(); kind++) {
        KeyOffset offset(kHeads, kDim);
        offset.begin(0, 1);
        std::vector<std::uint16_t> halves(kEmbd);
        for (auto& h : halves) h = to_half(10 * normal(rng));
        offset.freeze(0, halves);
        if (kind < kinds.size()) offset.set_rope(kinds[kind]);
        const CellPositions cells(kTileKeys, 1);
        const KeyTransform keys = offset.transform(cells);
        for (const int pos : {0, 5, 1000, 16000, 300000}) {
            std::vector<float> x(kEmbd), shift(offset.mu(0).begin(), offset.mu(0).end()), q(kDim), terms(2 * offset.n_freq());
            offset.add_offset(0, x, pos);
            for (float& v : q) v = normal(rng);
            const int width = turn_width(offset.n_freq());
            std::vector<float> table(kDim), turn(2 * width);
            turn_row(offset.turns(), offset.n_freq(), pos, turn.data());
            for (int h = 0; h < kHeads; h++) {
                const auto head = std::span(shift).subspan(h * kDim, kDim);
                if (kind < kinds.size()) rope_table(kinds[kind], static_cast<float>(pos), table), rope_apply(kinds[kind], table, head);
                double dot = 0, term = 0;
                for (int i = 0; i < kDim; i++) {
                    EXPECT_NEAR(x[h * kDim + i], head[i], 5e-5) << "kind " << kind << " position " << pos;
                    dot += static_cast<double>(q[i]) * head[i];
                }
                query_terms(keys.rope, kDim, keys.mu[0] + 2 * h * kDim, q.data(), terms.data());
                for (int i = 0; i < offset.n_freq(); i++)
                    term += static_cast<double>(terms[i]) * turn[i] + static_cast<double>(terms[offset.n_freq() + i]) * turn[width + i];
                EXPECT_NEAR(term, dot, 2e-4) << "kind " << kind << " position " << pos;
            }
        }
    }
}

TEST(KeyOffset, DoesNotDependOnHowRowsAreCut) {
    for (const int n : {50, 300}) {
        const auto pos = iota32(n);
        const auto x = biased_keys(pos, some_bias(), 2);
        KeyOffset one(kHeads, kDim), many(kHeads, kDim);
        one.set_rope(rope()), many.set_rope(rope());
        one.begin(0, 1), many.begin(0, 1);
        one.observe(0, x.data(), kEmbd, iota64(n), pos);
        for (int i = 0; i < n; i++) many.observe(0, x.data() + i * kEmbd, kEmbd, iota64(1, i), iota32(1, i));
        EXPECT_EQ(one.frozen(0), n == 300);
        EXPECT_EQ(many.frozen(0), n == 300);
        EXPECT_TRUE(std::equal(one.mu(0).begin(), one.mu(0).end(), many.mu(0).begin()));
    }
}

TEST_P(KeyOffsetCache, TakesTheBiasOutOfTheError) {
    const auto pos = iota32(400);
    const auto x = biased_keys(pos, some_bias(), 3);
    Cache with(CodecId::turbo3), without(CodecId::turbo3, false);
    ASSERT_TRUE(with.write(x, iota64(400), pos));
    ASSERT_TRUE(without.kv->encode_rows(serial(), {x.data(), kEmbd, iota64(400), {}, {}}));
    // Variance 1 a value remains: 3-bit error .0336 of it. With the bias in, about 60 times the energy is quantized.
    EXPECT_GT(with.error(x, 0, 400), 0.030);
    EXPECT_LT(with.error(x, 0, 400), 0.038);
    EXPECT_GT(without.error(x, 0, 400), 20 * with.error(x, 0, 400));
}

TEST_P(KeyOffsetCache, TokenByTokenGivesTheBytesOfABatch) {
    for (const int n : {100, 400}) {
        const auto pos = iota32(n);
        const auto x = biased_keys(pos, some_bias(), 4);
        Cache batch(CodecId::turbo3), tokens(CodecId::turbo3);
        ASSERT_TRUE(batch.write(x, iota64(n), pos));
        for (int i = 0; i < n; i++) ASSERT_TRUE(tokens.write(x, iota64(1, i), iota32(1, i), i));
        EXPECT_LT(tokens.error(x, 0, n), 0.038);
        EXPECT_EQ(batch.save(0, n), tokens.save(0, n));
    }
}

// Each sequence is encoded as if it were alone in the cache.
TEST_P(KeyOffsetCache, SequencesDoNotDisturbEachOther) {
    const auto pos = iota32(300);
    const auto x = biased_keys(pos, some_bias(), 10), y = biased_keys(pos, some_bias(), 11);
    Cache alone(CodecId::turbo4), shared(CodecId::turbo4);
    ASSERT_TRUE(alone.write(y, iota64(100), iota32(100)));
    ASSERT_TRUE(shared.write(x, iota64(300), pos));
    ASSERT_TRUE(shared.write(y, iota64(40, 300), iota32(40)));
    ASSERT_TRUE(shared.write(y, iota64(60, 340), iota32(60, 40), 40));
    std::vector<float> a(kEmbd), b(kEmbd);
    for (int i = 0; i < 100; i++) {
        alone.kv->read_row(i, alone.cells, a), shared.kv->read_row(300 + i, shared.cells, b);
        EXPECT_EQ(a, b) << i;
    }
}

// Saved and restored into an empty cache of another process: the same codes and the same offset, before and after freezing.
TEST_P(KeyOffsetCache, SavedStateIsLossless) {
    for (const CodecInfo& codec : kCodecs) {
        if (!codec.rotated) continue;
        for (const int n : {10, 300}) {
            const auto pos = iota32(n, 0);
            const auto x = biased_keys(pos, some_bias(), 5);
            Cache a(codec.id), b(codec.id);
            ASSERT_TRUE(a.write(x, iota64(n), pos));
            const auto saved = a.save(0, n);
            ASSERT_EQ(b.kv.restore_rows(64, n, saved.data(), b.cells, true), RestoreResult::ok);
            std::vector<float> before(kEmbd), after(kEmbd);
            for (int i = 0; i < n; i++) {
                EXPECT_EQ(b.cells.at(64 + i), i);
                a.kv->read_row(i, a.cells, before), b.kv->read_row(64 + i, b.cells, after);
                ASSERT_EQ(before, after) << codec.name << " n=" << n << " row " << i;
            }
            // Both go on alike.
            const auto next = iota32(50, n);
            const auto y = biased_keys(next, some_bias(), 12);
            ASSERT_TRUE(a.write(y, iota64(50, n), next));
            ASSERT_TRUE(b.write(y, iota64(50, 64 + n), next));
            for (int i = 0; i < n + 50; i++) {
                a.kv->read_row(i, a.cells, before), b.kv->read_row(64 + i, b.cells, after);
                ASSERT_EQ(before, after) << codec.name << " n=" << n << " row " << i << " after going on";
            }
        }
    }
}

TEST_P(KeyOffsetCache, RowsOfAnF16CacheCanBeRestored) {
    const auto x = biased_keys(iota32(100), some_bias(), 6);
    std::vector<std::uint16_t> rows(100 * kEmbd);
    std::transform(x.begin(), x.end(), rows.begin(), to_half);
    Cache c(CodecId::turbo8);
    ASSERT_EQ(c.kv.restore_rows(0, 100, rows.data(), c.cells, true), RestoreResult::ok);
    EXPECT_EQ(c.cells.at(5), -1) << "no position is known: kept as it is, without an offset";
    EXPECT_LT(c.error(x, 0, 100), 60 * 1e-4);
}

TEST_P(KeyOffsetCache, StateMovesBetweenFormatsAndOffsets) {
    const auto pos = iota32(300);
    const auto x = biased_keys(pos, some_bias(), 8), y = biased_keys(pos, some_bias(), 9);
    Cache a(CodecId::turbo8), b(CodecId::turbo6);
    ASSERT_TRUE(a.write(x, iota64(300), pos));
    ASSERT_TRUE(b.write(y, iota64(100), iota32(100)));
    const auto saved = a.save(0, 300);
    ASSERT_EQ(b.kv.restore_rows(200, 300, saved.data(), b.cells, true), RestoreResult::ok);
    EXPECT_LT(b.error(x, 200, 300), 0.002);
    EXPECT_LT(b.error(y, 0, 100), 0.002);
    // One row alone does not tell its offset to a cache of another format that does not have it.
    Cache c(CodecId::turbo6);
    EXPECT_EQ(c.kv.restore_rows(300, 1, saved.data(), c.cells, true), RestoreResult::ok) << "more may come";
    EXPECT_EQ(c.kv->finish_restore(serial(), c.cells), RestoreResult::offset_missing);
}

// llama.cpp hands over a saved sequence in runs of neighbouring cells, down to single rows.
TEST_P(KeyOffsetCache, OffsetArrivesRowByRow) {
    const auto x = biased_keys(iota32(100), some_bias(), 8);
    Cache a(CodecId::turbo8), b(CodecId::turbo8);
    ASSERT_TRUE(a.write(x, iota64(100), iota32(100)));
    const auto saved = a.save(0, 100);
    for (int i = 0; i < 100; i++) {
        ASSERT_EQ(b.kv.restore_rows(200 + 2 * i, 1, saved.data() + i * kEmbd, b.cells, true), RestoreResult::ok);
        EXPECT_EQ(b.kv->offset()->expected(b.cells.offset_id(200)), i < 2) << "three rows of turbo8 hold an offset";
    }
    std::vector<float> one(kEmbd), other(kEmbd);
    for (int i = 0; i < 100; i++) {
        a.kv->read_row(i, a.cells, one), b.kv->read_row(200 + 2 * i, b.cells, other);
        EXPECT_EQ(one, other) << i;
    }
}

TEST_P(KeyOffsetCache, FreezingAndResetting) {
    Cache c(CodecId::turbo4);
    const auto pos = iota32(40);
    const auto x = biased_keys(pos, some_bias(), 7);
    ASSERT_TRUE(c.write(x, iota64(40), pos));
    const int id = c.cells.offset_id(0);
    EXPECT_FALSE(c.kv->offset()->frozen(id));
    c.kv->freeze();
    EXPECT_TRUE(c.kv->offset()->frozen(id));
    EXPECT_LT(c.error(x, 0, 40), 0.012);
    c.kv->reset();
    c.cells.clear();
    ASSERT_TRUE(c.write(x, iota64(40), pos));
    EXPECT_FALSE(c.kv->offset()->frozen(c.cells.offset_id(0)));
}

// A prefix taken over from another sequence and another continuation: as if the first had never been.
TEST_P(KeyOffsetCache, ASequenceCutBackIsMeasuredAnew) {
    for (const int cut : {20, 70}) {
        const auto x = biased_keys(iota32(100), some_bias(), 13), y = biased_keys(iota32(100), some_bias(), 14);
        auto branch = x;
        std::copy(y.begin() + cut * kEmbd, y.end(), branch.begin() + cut * kEmbd);
        Cache alone(CodecId::turbo4), reused(CodecId::turbo4);
        ASSERT_TRUE(alone.write(branch, iota64(100), iota32(100)));
        const int seen = cut == 20 ? 50 : 100;  // what was frozen on other tokens stays so
        ASSERT_TRUE(reused.write(x, iota64(seen), iota32(seen)));
        ASSERT_TRUE(reused.write(branch, iota64(100 - cut, cut), iota32(100 - cut, cut), cut));
        std::vector<float> a(kEmbd), b(kEmbd);
        for (int i = 0; i < 100; i++) {
            alone.kv->read_row(i, alone.cells, a), reused.kv->read_row(i, reused.cells, b);
            EXPECT_EQ(a, b) << "cut at " << cut << " row " << i;
        }
    }
}
