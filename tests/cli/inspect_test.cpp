// The command `turboquant inspect`.
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "support.h"

namespace turboquant::cli {
namespace {

using nlohmann::json;

bool has(const std::string& text, const std::string& part) { return text.find(part) != text.npos; }

TEST(InspectCommand, JsonHasTheKeys) {
    const Outcome r = run_command("inspect --json -n 256" + kModel);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    const json j = json::parse(r.out);
    EXPECT_TRUE(j["plan"].is_null());
    EXPECT_EQ(j["tokens"], 256);
    EXPECT_EQ(j["text"], "text of several kinds") << "what ships, not what the model writes";
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
    const Outcome r = run_command("inspect -n 256 --bits 4.5 -f " + kText + kModel);
    ASSERT_EQ(r.exit_code, 0) << r.err;
    EXPECT_TRUE(has(r.out, "K offset") && has(r.out, "Plan for 4.5 bits") && has(r.out, "--kv ")) << r.out;
}

TEST(InspectCommand, Errors) {
    const Outcome no_model = run_command("inspect -m /nonexistent.gguf");
    EXPECT_EQ(no_model.exit_code, 1);
    EXPECT_TRUE(has(no_model.err, "/nonexistent.gguf")) << no_model.err;
    const Outcome short_text = run_command("inspect" + kModel + "-f " + write_file("short.txt", "a few words"));
    EXPECT_EQ(short_text.exit_code, 1);
    EXPECT_TRUE(has(short_text.err, "longer")) << short_text.err;
}

TEST(InspectCommand, TellsAModelWithABiasFromOneWithout) {
    const auto models = std::filesystem::path(TQ_DEMO_MODEL).parent_path() / ".." / ".." / "shared" / "models";
    if (!exists(models / "biased.gguf")) GTEST_SKIP() << "no ../shared/models/biased.gguf";
    const auto of = [&](const char* name) {
        const Outcome r = run_command("inspect --json -n 512 -t 1 -m '" + (models / name).string() + "'");
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
