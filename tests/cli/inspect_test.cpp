// `turboquant inspect`: the statistics on made-up data, the verdict, the command.
#include "turboquant/cli/inspect.h"

#include <gtest/gtest.h>

#include <cmath>

#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

/// Two heads of 4, two tokens: head 0 the same both times, head 1 with the sign changed.
std::vector<float> keys(float scale) {
    return {3 * scale, 0, 4 * scale, 0, 1 * scale,  1 * scale,  1 * scale,  7 * scale,
            3 * scale, 0, 4 * scale, 0, -1 * scale, -1 * scale, -1 * scale, -7 * scale};
}

TEST(KvStatistics, KnownAnswers) {
    KvStatistics s;
    const std::vector<float> before = keys(1), after = keys(2), values = keys(0.5f);
    s.add({3, KvSource::key, 4, 2, 2, after.data(), 4, 8});
    s.add({3, KvSource::key_before_rope, 4, 2, 1, before.data(), 4, 8});
    s.add({3, KvSource::key_before_rope, 4, 2, 1, before.data() + 8, 4, 8});
    s.add({3, KvSource::value, 4, 2, 2, values.data(), 4, 8});
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

TEST(InspectCommand, JsonHasTheKeys) {
    const Outcome r = run_command("inspect --no-plan --json -n 256" + kModel);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const json j = json::parse(r.out);
    EXPECT_TRUE(j["plan"].is_null());
    EXPECT_EQ(j["tokens"], 256);
    ASSERT_EQ(j["layers"].size(), 6u);
    double k_norm = 0, v_norm = 0;
    for (const json& l : j["layers"]) {
        for (const char* key :
             {"layer", "k_norm", "v_norm", "ratio", "k_max_rms", "k_median_rms", "k_outlier_share", "v_outlier_share", "k_offset_share"})
            EXPECT_TRUE(l.at(key).is_number()) << key;
        EXPECT_EQ(l["k_norm_heads"].size(), 2u);
        EXPECT_GT(l["k_max_rms"], l["k_median_rms"]);
        EXPECT_GT(l["k_offset_share"], 0.01);
        EXPECT_LT(l["k_offset_share"], 0.95);
        k_norm += l["k_norm"].get<double>() / 6, v_norm += l["v_norm"].get<double>() / 6;
    }
    EXPECT_NEAR(j["k_norm"], k_norm, 1e-9);
    EXPECT_NEAR(j["v_norm"], v_norm, 1e-9);
    EXPECT_NEAR(j["ratio"], k_norm / v_norm, 1e-9);
    EXPECT_TRUE(has(j["verdict"], "uniform 4-bit K")) << j["verdict"];
}

TEST(InspectCommand, TableWithAPlan) {
    const Outcome r = run_command("inspect -n 256 --bits 4.5 -f " + demo_text() + kModel);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    EXPECT_TRUE(has(r.out, "K offset") && has(r.out, "Plan for 4.5 bits") && has(r.out, "--kv ")) << r.out;
}

TEST(InspectCommand, Errors) {
    const Outcome no_model = run_command("inspect -m /nonexistent.gguf");
    EXPECT_EQ(no_model.exit_code, 1);
    EXPECT_TRUE(has(no_model.err, "/nonexistent.gguf")) << no_model.err;
    const Outcome short_text = run_command("inspect --no-plan" + kModel + "-f " + write_file("short.txt", "a few words"));
    EXPECT_EQ(short_text.exit_code, 1);
    EXPECT_TRUE(has(short_text.err, "longer")) << short_text.err;
}

TEST(InspectCommand, TellsAModelWithABiasFromOneWithout) {
    const auto models = std::filesystem::path(TQ_DEMO_MODEL).parent_path() / ".." / ".." / "shared" / "models";
    if (!exists(models / "biased.gguf")) GTEST_SKIP() << "no ../shared/models/biased.gguf";
    const auto of = [&](const char* name) {
        const Outcome r = run_command("inspect --no-plan --json -n 512 -t 1 -m '" + (models / name).string() + "'");
        EXPECT_EQ(r.exit_code, 0) << r.err;
        return json::parse(r.out);
    };
    const json biased = of("biased.gguf"), plain = of("plain.gguf");
    EXPECT_TRUE(has(biased["verdict"], "carry a bias") && has(biased["verdict"], "will fail")) << biased["verdict"];
    EXPECT_FALSE(has(plain["verdict"], "bias")) << plain["verdict"];
    EXPECT_NEAR(biased["layers"][0]["k_outlier_share"], 0.2, 0.04);
    EXPECT_GT(biased["ratio"], 5 * plain["ratio"].get<double>());
}

}  // namespace
}  // namespace turboquant::cli
