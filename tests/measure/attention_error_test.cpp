// What errors of keys and values do to attention's output, on made-up heads: held against formulas, and against attention over keys that were
// coded.
#include "turboquant/measure/attention_error.h"

#include <gtest/gtest.h>

#include <cmath>

#include "turboquant/codec/random.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/tile.h"

namespace turboquant::measure {
namespace {

constexpr int kDim = 64, kTokens = 96;

/// One KV head of 64 read by one query head, no RoPE, no window, of random rows; `sharpness` scales the queries.
struct Head {
    std::vector<float> q, k, v, stream;

    explicit Head(double sharpness) : q(kTokens * kDim), k(q), v(q), stream(kTokens, 0.f) {
        SplitMix64 random(7);
        for (float& x : q) x = static_cast<float>(sharpness * random.normal());
        for (float& x : k) x = static_cast<float>(random.normal());
        for (float& x : v) x = static_cast<float>(random.normal());
        for (float& x : stream) x = 2;  // one channel: a square of 4
    }
    static std::vector<llama::KvLayerShape> shapes() {
        llama::KvLayerShape s;
        s.k_head_dim = s.v_head_dim = kDim, s.k_heads = s.v_heads = 1, s.n_cells = kTokens, s.attention_scale = 1 / std::sqrt(64.f);
        return {s};
    }
    HeadError error(WindowSizes windows) const {
        llama::OutputWeights weights(TQ_DEMO_MODEL);  // which has no layer of such heads: the identity projects
        AttentionErrors errors(shapes(), false, windows, weights);
        const auto add = [&](llama::KvSource source, const std::vector<float>& rows, int dim) {
            errors.add({0, source, dim, 1, kTokens, rows.data(), static_cast<std::size_t>(dim), static_cast<std::size_t>(dim)}, kTokens);
        };
        add(llama::KvSource::query, q, kDim), add(llama::KvSource::key, k, kDim), add(llama::KvSource::value, v, kDim);
        add(llama::KvSource::stream, stream, 1);
        const std::vector<HeadError> heads = errors.heads({}, 1);
        return heads.size() == 1 ? heads[0] : HeadError{};
    }
    std::vector<double> attend(const std::vector<float>& keys, std::size_t t) const {
        std::vector<double> p(t + 1), out(kDim, 0);
        double sum = 0;
        for (std::size_t j = 0; j <= t; j++) {
            double score = 0;
            for (std::size_t i = 0; i < kDim; i++) score += static_cast<double>(q[t * kDim + i]) * keys[j * kDim + i];
            sum += p[j] = std::exp(score / 8);
        }
        for (std::size_t j = 0; j <= t; j++)
            for (std::size_t i = 0; i < kDim; i++) out[i] += p[j] / sum * v[j * kDim + i];
        return out;
    }
};

TEST(AttentionErrors, ValuesOfEvenAttention) {
    // Queries of zero weigh all tokens alike: n errors of square e |v|^2, each over n, add up to e |v|^2 / n.
    const Head head(0);
    const HeadError all = head.error({0, 0}), windows = head.error({4, 8});
    double expected = 0, in_windows = 0;
    int n = 0;
    for (int t = kTokens / 4; t < kTokens; t++) {
        if (t % 6 != 0) continue;
        double squares = 0, stored = 0;
        for (int j = 0; j <= t; j++)
            for (int i = 0; i < kDim; i++) {
                const double square = std::pow(head.v[static_cast<std::size_t>(j * kDim + i)], 2);
                squares += square, stored += j >= 4 && j + 8 <= t ? square : 0;
            }
        expected += squares / std::pow(t + 1, 2) / 4, in_windows += stored / std::pow(t + 1, 2) / 4, n++;
    }
    EXPECT_NEAR(all.values, expected / n, 1e-4 * expected / n);
    EXPECT_NEAR(windows.values, in_windows / n, 1e-4 * in_windows / n);
    for (const double k : all.keys) EXPECT_LT(k, 1e-12) << "a query of zero sees no keys";
}

TEST(AttentionErrors, KeysAsWhenTheyAreCoded) {
    const Head head(1.5);
    const HeadError e = head.error({0, 0});
    ASSERT_EQ(e.keys.size(), std::size(kKeyErrors));
    for (std::size_t i = 1; i < e.keys.size(); i++) EXPECT_GT(e.keys[i], e.keys[i - 1]);
    EXPECT_NEAR(e.keys[1] / e.keys[0], kKeyErrors[1] / kKeyErrors[0], 0.4) << "in proportion while small";
    for (const CodecId codec : {CodecId::tcq2, CodecId::tcq4}) {
        const TileShape shape{codec, Side::key, kDim};
        std::vector<std::uint8_t> tile(tile_bytes(shape));
        std::vector<float> keys = head.k;
        for (std::size_t j = 0; j < kTokens; j++) {
            const std::span<float> row(keys.data() + j * kDim, kDim);
            tile_encode(shape, tile.data(), 0, row, default_norm_mode(Side::key));
            tile_decode_rotated(shape, tile.data(), 0, row);
            rotation_for(kDim).inverse(row);
        }
        double seen = 0;
        int n = 0;
        for (std::size_t t = kTokens / 4; t < kTokens; t++) {
            if (t % 6 != 0) continue;
            const std::vector<double> exact = head.attend(head.k, t), coded = head.attend(keys, t);
            for (std::size_t i = 0; i < kDim; i++) seen += std::pow(coded[i] - exact[i], 2) / 4;
            n++;
        }
        MeasuredSlot slot;
        slot.head_dim = kDim, slot.of_heads = 1, slot.expected = e.keys;
        const double expected = slot.expected_at(relative_mse(codec, Side::key, kDim));
        EXPECT_GT(expected, 0.6 * seen / n) << codec_info(codec).name;
        EXPECT_LT(expected, 1.6 * seen / n) << codec_info(codec).name;
    }
}

}  // namespace
}  // namespace turboquant::measure
