// The reference itself, against formulas written out by hand and against attention in the model's space.
#include "turboquant/attention/attention.h"

#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "tests/attention/problem.h"

namespace turboquant::test {
namespace {

// Attention over the uncompressed vectors, nothing rotated, in the plainest words.
std::vector<double> plain_attention(const Problem& p, const Case& c) {
    std::vector<double> out;
    const int group = c.n_head / c.n_head_kv;
    for (int t = 0; t < c.n_tokens; ++t)
        for (int h = 0; h < c.n_head; ++h) {
            std::vector<double> w(c.n_kv), y(c.v_dim);
            double sum = 0;
            for (int j = 0; j < c.n_kv; ++j) {
                double qk = 0;
                for (int i = 0; i < c.k_dim; ++i)
                    qk += static_cast<double>(p.q[(t * c.n_head + h) * c.k_dim + i]) * p.keys[(h / group * c.n_kv + j) * c.k_dim + i];
                sum += w[j] = std::exp(qk / std::sqrt(c.k_dim));
            }
            for (int j = 0; j < c.n_kv; ++j)
                for (int i = 0; i < c.v_dim; ++i) y[i] += w[j] / sum * p.values[(h / group * c.n_kv + j) * c.v_dim + i];
            out.insert(out.end(), y.begin(), y.end());
        }
    return out;
}

TEST(Reference, EqualsPlainAttentionUpToTheCodec) {
    // Bounds on both sides: an error too small would mean that the codec was bypassed.
    struct Expected {
        CodecId codec;
        double low, high;
    };
    for (const auto& [codec, low, high] :
         {Expected{CodecId::raw, 1e-9, 1e-6}, {CodecId::turbo8, 2e-5, 4e-4}, {CodecId::turbo4, 5e-3, 0.06}, {CodecId::turbo2, 0.06, 0.6}}) {
        const Case c{.k = codec, .v = codec, .k_dim = 96, .v_dim = 64, .n_head = 6, .n_head_kv = 2, .n_tokens = 3, .n_kv = 100};
        Problem p(c);
        const std::vector<double> plain = plain_attention(p, c);
        const double error = relative_error(p.reference(), std::vector<float>(plain.begin(), plain.end()));
        EXPECT_GT(error, low) << codec_info(codec).name;
        EXPECT_LT(error, high) << codec_info(codec).name;
    }
}

// One visible cell: the output is its value, whatever the query.
TEST(Reference, OneCellGivesItsValue) {
    const Case c{.k = CodecId::raw, .v = CodecId::raw, .n_kv = 1};
    Problem p(c);
    EXPECT_LT(relative_error(p.reference(),
                             [&] {
                                 std::vector<float> twice = p.values;
                                 twice.insert(twice.end(), p.values.begin(), p.values.end());
                                 return twice;
                             }()),
              1e-6);
}

// Two cells with known logits, in each of the ways a logit is made.
class TwoCells : public testing::Test {
  protected:
    TwoCells() : p({.k = CodecId::raw, .v = CodecId::raw, .n_head = 1, .n_kv = 2}) {
        std::fill(p.q.begin(), p.q.end(), 0.0f);
        p.q[0] = 1;
        std::vector<float> x(64);
        for (int j = 0; j < 2; ++j) {
            std::fill(x.begin(), x.end(), 0.0f);
            x[0] = static_cast<float>(2 * j);  // q.k = 0 and 2
            tile_encode(p.args.k.shape, p.k_tiles.data(), j, x);
            x[0] = static_cast<float>(j);  // so the output's first value is the weight of cell 1
            tile_encode(p.args.v.shape, p.v_tiles.data(), j, x);
        }
        p.args.scale = 1;
    }
    double weight() { return p.reference()[0]; }
    static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
    Problem p;
};

TEST_F(TwoCells, Plain) { EXPECT_NEAR(weight(), sigmoid(2), 1e-6); }
TEST_F(TwoCells, Scale) {
    p.args.scale = 0.25f;
    EXPECT_NEAR(weight(), sigmoid(0.5), 1e-6);
}
TEST_F(TwoCells, SoftCap) {
    p.args.logit_softcap = 1.5f;
    EXPECT_NEAR(weight(), sigmoid(1.5 * std::tanh(2 / 1.5)), 1e-6);
}
TEST_F(TwoCells, MaskAndSlope) {
    const std::uint16_t mask[] = {to_half(1), to_half(-2)};
    p.args.mask = mask;
    EXPECT_NEAR(weight(), sigmoid(2 - 3), 1e-6);
    p.args.max_bias = 4;  // one head: slope 2^-4
    EXPECT_NEAR(weight(), sigmoid(2 - 3.0 / 16), 1e-6);
}
TEST_F(TwoCells, Sink) {
    const float sink = 1;
    p.args.sinks = &sink;
    EXPECT_NEAR(weight(), std::exp(2) / (1 + std::exp(2) + std::exp(1)), 1e-6);
}
TEST_F(TwoCells, ScoreTerm) {
    const float q_term[] = {0.5f, -1};  // e = 0.5 cos - sin
    const double frequency = 0.3;
    const std::vector<float> turns = make_turns({&frequency, 1});
    const std::int32_t positions[] = {-1, 70};  // cell 0 has no term
    const double e = 0.5 * std::cos(21) - std::sin(21);
    p.args.term = {1, q_term, turns.data(), positions};
    p.args.scale = 2;
    EXPECT_NEAR(weight(), sigmoid(2 * (2 + e)), 1e-6);
    p.args.logit_softcap = 3;  // the term is inside of the cap
    EXPECT_NEAR(weight(), sigmoid(3 * std::tanh(2 * (2 + e) / 3)), 1e-6);
}
TEST_F(TwoCells, Masked) {
    const std::uint16_t mask[] = {kMaskHidden, kMaskHidden};
    p.args.mask = mask;
    EXPECT_EQ(weight(), 0);
}

TEST(Turns, EveryPositionOfTheTable) {
    const std::vector<double> frequencies = {1, 0.3, 0.01, 1e-6, 0};
    const std::vector<float> turns = make_turns(frequencies);
    const std::size_t width = turn_width(5);
    ASSERT_EQ(turns.size(), 256 * 2 * width);
    std::vector<float> row(2 * width);
    for (const std::int32_t pos : {0, 1, 63, 64, 65, 4095, 4096, 16384 + 77, (1 << 18) - 1, 1 << 18, (1 << 24) - 1}) {
        turn_row(turns.data(), 5, pos, row.data());
        for (std::size_t i = 0; i < width; ++i) {
            EXPECT_NEAR(row[i], i < 5 ? std::cos(pos * frequencies[i]) : 0, 4e-7) << pos;
            EXPECT_NEAR(row[width + i], i < 5 ? std::sin(pos * frequencies[i]) : 0, 4e-7) << pos;
        }
    }
}

TEST(Alibi, Slopes) {
    for (int h = 0; h < 8; ++h) EXPECT_FLOAT_EQ(alibi_slope(8, 8, h), std::exp2(-static_cast<float>(h + 1)));
    // 12 heads: the first 8 as for 8 heads, then every other slope of 16 heads (Press et al.)
    EXPECT_FLOAT_EQ(alibi_slope(8, 12, 8), std::exp2(-0.5f));
    EXPECT_FLOAT_EQ(alibi_slope(8, 12, 11), std::exp2(-3.5f));
    EXPECT_EQ(alibi_slope(0, 12, 11), 1.0f);
}

// Every defect is found and named; the good arguments pass.
TEST(CheckArgs, NamesTheDefect) {
    const Case c{.n_head = 4, .n_head_kv = 2, .n_tokens = 2, .n_kv = 100, .mask = Mask::causal, .n_freq = 2};
    Problem p(c);
    EXPECT_EQ(check_attention_args(p.args), nullptr);
    const auto defect = [&](auto change, const char* part) {
        AttentionArgs a = p.args;
        change(a);
        const char* error = check_attention_args(a);
        ASSERT_NE(error, nullptr) << part;
        EXPECT_NE(std::strstr(error, part), nullptr) << error;
        EXPECT_THROW(reference_attention(a), std::invalid_argument);
    };
    defect([](AttentionArgs& a) { a.n_head = 5; }, "multiple");
    defect([](AttentionArgs& a) { a.n_head_kv = 0; }, "multiple");
    defect([](AttentionArgs& a) { a.n_kv = -1; }, "negative");
    defect([](AttentionArgs& a) { a.k.shape.head_dim = 72; }, "head size");
    defect([](AttentionArgs& a) { std::swap(a.k, a.v); }, "exchanged");
    defect([](AttentionArgs& a) { a.v_is_k = true; }, "exchanged");
    defect([](AttentionArgs& a) { a.v_dim_out = 32; }, "output");
    defect([](AttentionArgs& a) { a.q = nullptr; }, "query");
    defect([](AttentionArgs& a) { a.v.tiles = nullptr; }, "tiles");
    defect([](AttentionArgs& a) { a.k.tile_stride = 16; }, "overlap");
    defect([](AttentionArgs& a) { a.q_token_stride = 0; }, "token stride");
    defect([](AttentionArgs& a) { a.out_head_stride = 0; }, "head stride");
    defect([](AttentionArgs& a) { a.mask_heads = 0; }, "mask");
    defect([](AttentionArgs& a) { a.term.cell_pos = nullptr; }, "score term");
}

}  // namespace
}  // namespace turboquant::test
