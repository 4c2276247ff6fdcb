// The statistics on made-up data, and the verdict.
#include "turboquant/measure/inspect.h"

#include <gtest/gtest.h>

#include <cmath>

namespace turboquant::measure {
namespace {

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

/// Two heads of 4, two tokens: head 0 the same both times, head 1 with the sign changed.
std::vector<float> keys(float scale) {
    return {3 * scale, 0, 4 * scale, 0, 1 * scale,  1 * scale,  1 * scale,  7 * scale,
            3 * scale, 0, 4 * scale, 0, -1 * scale, -1 * scale, -1 * scale, -7 * scale};
}

TEST(KvStatistics, KnownAnswers) {
    KvStatistics s;
    const std::vector<float> before = keys(1), after = keys(2), values = keys(0.5f);
    s.add({3, llama::KvSource::key, 4, 2, 2, after.data(), 4, 8});
    s.add({3, llama::KvSource::key_before_rope, 4, 2, 1, before.data(), 4, 8});
    s.add({3, llama::KvSource::key_before_rope, 4, 2, 1, before.data() + 8, 4, 8});
    s.add({3, llama::KvSource::value, 4, 2, 2, values.data(), 4, 8});
    const std::vector<LayerStatistics> layers = s.layers(3);
    ASSERT_EQ(layers.size(), 1u);
    const LayerStatistics& l = layers[0];
    EXPECT_EQ(l.layer, 3);
    const double n1 = std::sqrt(52.0);
    EXPECT_NEAR(l.k.norm_heads[0], 10, 1e-9);
    EXPECT_NEAR(l.k.norm_heads[1], 2 * n1, 1e-6);
    EXPECT_NEAR(l.k.norm, 5 + n1, 1e-6);
    ASSERT_TRUE(l.v);
    EXPECT_NEAR(*l.ratio(), 4, 1e-6);
    EXPECT_NEAR(l.k.max_rms, 14, 1e-6);
    EXPECT_NEAR(l.k.median_rms, 2, 1e-6);
    EXPECT_EQ(l.k.outlier_share, 1 / 8.0) << "7 of {1, 1, 1, 7}; in {3, 0, 4, 0} the upper median is 3";
    EXPECT_EQ(s.layers(8)[0].k.outlier_share, 0);
    EXPECT_NEAR(l.k_offset_share, 25.0 / 77, 1e-9) << "head 0 is constant, head 1 cancels";
}

LayerStatistics layer(int index, double offset_share, double k_norm = 10, double outliers = 0) {
    LayerStatistics l;
    l.layer = index, l.k_offset_share = offset_share;
    l.k.norm = k_norm, l.k.outlier_share = outliers;
    l.v = SideStatistics{};
    l.v->norm = 8;
    return l;
}

TEST(Verdict, FollowsFromTheOffset) {
    const std::string fine = verdict({layer(0, 0.1), layer(1, 0.8)}, 3);
    EXPECT_TRUE(has(fine, "Nothing in this model's keys breaks uniform 4-bit K") && !has(fine, "bias") && has(fine, "layer 1")) << fine;
    EXPECT_TRUE(has(fine, "none of K's") && !has(fine, "times as long")) << fine;
    const std::string mild = verdict({layer(0, 0.98), layer(1, 0.8)}, 3);
    EXPECT_TRUE(has(mild, "carry a bias") && has(mild, "lose much") && has(mild, "layer 0") && has(mild, "takes 5 bits")) << mild;
    const std::string fails = verdict({layer(0, 0.99999, 778, 0.2)}, 3);
    EXPECT_TRUE(has(fails, "Uniform 4-bit K will fail") && has(fails, "more than 8 bits")) << fails;
    EXPECT_TRUE(has(fails, "up to 20.0 % (layer 0) of K's") && has(fails, "97.2 times as long")) << fails;
}

TEST(Verdict, WithoutValues) {
    LayerStatistics l = layer(0, 0.5);
    l.v.reset();
    EXPECT_FALSE(l.ratio());
    EXPECT_TRUE(has(verdict({l}, 3), "none of V's"));
}

}  // namespace
}  // namespace turboquant::measure
