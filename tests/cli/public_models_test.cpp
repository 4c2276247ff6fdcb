// Models that people know, where scripts/fetch-models has brought them: what the cache costs them, with weights in F16, so that only the cache counts.
#include <gtest/gtest.h>

#include <map>

#include "nlohmann/json.hpp"
#include "support.h"
#include "turboquant/llama/calibration_text.h"

namespace turboquant::cli {
namespace {

/// Where scripts/fetch-models puts its files; empty if this one is not there.
std::string public_model(const char* file) {
    const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
    if (!(cache && *cache) && !home) return {};
    const auto folder = cache && *cache ? std::filesystem::path(cache) : std::filesystem::path(home) / ".cache";
    const auto path = folder / "turboquant/models" / file;
    return exists(path) ? path.string() : std::string();
}

/// Mean divergence of each SPEC over n_ctx tokens of the text that ships for races, which nothing is measured or tuned on.
std::map<std::string, double> divergence(const std::string& model, int n_ctx, const std::string& specs) {
    std::string text;
    for (const char* part : llama::held_out_parts()) text += std::string(part) + "\n\n";
    const Outcome r = run_command("eval -t 2 -m '" + model + "' --weights f16 -f '" + write_file("held_out.txt", text) + "' -c " +
                                  std::to_string(n_ctx) + " --chunks 1 --json --kv " + specs);
    EXPECT_EQ(r.exit_code, 0) << r.err;
    std::map<std::string, double> kld;
    if (r.exit_code == 0)
        for (const auto& row : nlohmann::json::parse(r.out)) kld[row["kv"]] = row["mean_kld"];
    return kld;
}

constexpr const char* kBring = " is not there: scripts/fetch-models brings it";

TEST(PublicModels, SmolLm2) {
    const std::string model = public_model("smollm2-135m-q4_1.gguf");
    if (model.empty()) GTEST_SKIP() << "SmolLM2-135M" << kBring;
    auto kld = divergence(model, 512, "raw turbo4 tcq3 auto4 q4_0");
    EXPECT_LT(kld["raw"], 1e-5) << "the floor";
    for (const auto& [kv, expected] : std::map<std::string, double>{{"turbo4", .0063}, {"tcq3", .020}}) {
        EXPECT_GT(kld[kv], expected / 2) << kv;
        EXPECT_LT(kld[kv], expected * 2) << kv;
    }
    EXPECT_LT(kld["auto4"], kld["turbo4"]) << "formats by rules are not worse than uniform ones";
    EXPECT_LT(kld["turbo4"], kld["q4_0"]);
}

/// Keys with a bias before RoPE: without its removal 4 bits break the model, as llama.cpp's do.
TEST(PublicModels, QwenHalfBillion) {
    const std::string model = public_model("qwen2.5-coder-0.5b-q4_k_m.gguf");
    if (model.empty()) GTEST_SKIP() << "Qwen2.5-Coder-0.5B" << kBring;
    auto kld = divergence(model, 256, "auto4 turbo4 turbo4,offset=off q4_0");
    EXPECT_GT(kld["q4_0"], 1);
    EXPECT_GT(kld["turbo4,offset=off"], .2);
    EXPECT_LT(kld["turbo4"], .06);
    EXPECT_GT(kld["turbo4"], .002);
    EXPECT_LT(kld["auto4"], kld["turbo4"]);
}

}  // namespace
}  // namespace turboquant::cli
