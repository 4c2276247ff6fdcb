// What is said about a cache at the verbosity that llama.cpp's tools have by default (warnings): what it is, and what of it is elsewhere.
#include <algorithm>
#include <regex>

#include "tests/ggml/support.h"

namespace turboquant::conformance {
namespace {

/// Warnings of ours since the last call.
std::vector<std::string> warnings() {
    std::vector<std::string> ours;
    for (const LogLine& line : take_log_lines())
        if (line.level == GGML_LOG_LEVEL_WARN && line.text.starts_with("turboquant: ")) ours.push_back(line.text);
    return ours;
}

ModelPtr demo_with_layers(const std::string& name, int n_gpu_layers) {
    std::vector<ggml_backend_dev_t> devices = device_list(name);
    llama_model_params params = llama_model_default_params();
    params.devices = devices.data();
    params.n_gpu_layers = n_gpu_layers;
    return ModelPtr(llama_model_load_from_file(TQ_DEMO_MODEL, params));
}

class Announced : public testing::TestWithParam<std::string> {};

TEST_P(Announced, WhatTheCacheIsOnceAContext) {
    llama_model* model = demo(GetParam());
    warnings();
    for (int i = 0; i < 2; i++) {
        const ContextPtr ctx = make_context(model, {.n_ctx = 2048});
        const std::vector<std::string> said = warnings();
        ASSERT_EQ(said.size(), 1u) << testing::PrintToString(said);
        const turboquant_kv_stats s = kv_stats(GetParam());
        std::smatch m;
        ASSERT_TRUE(std::regex_search(
            said[0], m,
            std::regex("6 layers, 2048 cells: ([0-9.]+) MiB, ([0-9.]+) bits a value \\(f16: ([0-9.]+) MiB\\); keys ([a-z0-9]+)")))
            << said[0];
        EXPECT_NEAR(std::stod(m[1]), static_cast<double>(s.format_bytes) / (1 << 20), 0.006);
        EXPECT_NEAR(std::stod(m[2]), s.bits_per_value, 0.001);
        EXPECT_NEAR(std::stod(m[3]), s.f16_bytes / (1 << 20), 0.006);
        EXPECT_EQ(m[4], GetParam());
        decode(ctx.get(), text_tokens(model, 100), 0, 0, 10);
        EXPECT_TRUE(warnings().empty()) << "once";
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, Announced, testing::Values("turbo4", "tcq3", "raw"), [](const auto& test) { return test.param; });

struct Elsewhere {
    const char* name;
    int n_gpu_layers;
    bool offload_kqv;
    const char* layers;
};
class Placed : public testing::TestWithParam<Elsewhere> {};

TEST_P(Placed, LayersElsewhereAreNamedWithTheRemedyOnceAContext) {
    const Elsewhere& p = GetParam();
    const ModelPtr model = demo_with_layers("turbo4", p.n_gpu_layers);
    for (int i = 0; i < 2; i++) {
        take_log_lines();
        llama_context_params params = llama_context_default_params();
        params.n_ctx = 1024;
        params.offload_kqv = p.offload_kqv;
        const ContextPtr ctx(llama_init_from_model(model.get(), params));
        ASSERT_TRUE(ctx);
        decode(ctx.get(), text_tokens(model.get(), 100), 0, 0, 10);
        const std::vector<std::string> said = warnings();
        const auto about = [](const std::string& s) { return s.find("NOT compressed") != s.npos; };
        ASSERT_EQ(std::ranges::count_if(said, about), p.layers ? 1 : 0) << testing::PrintToString(said);
        if (!p.layers) continue;
        const std::string text = *std::ranges::find_if(said, about);
        // A GPU that never had layers is asked next to nothing, and does not know which there are.
        const bool unknown = on_gpu() && p.n_gpu_layers == 0 && text.find("all layers") != text.npos;
        for (const char* part : {unknown ? "all layers" : p.layers, "-ngl 99", "n_gpu_layers=-1", "-nkvo", "f16"})
            EXPECT_NE(text.find(part), text.npos) << text;
    }
}

INSTANTIATE_TEST_SUITE_P(Layers, Placed,
                         testing::Values(Elsewhere{"None", 0, true, "6 of 6 layers (0-5)"},
                                         Elsewhere{"Some", 3, true, "4 of 6 layers (0-3)"},
                                         Elsewhere{"NoOffload", -1, false, "6 of 6 layers (0-5)"}, Elsewhere{"All", -1, true, nullptr}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace turboquant::conformance
