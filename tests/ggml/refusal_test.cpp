// What cannot work fails when the context is made, with the cause in the log; what fails later says so in the same words each time.
#include <algorithm>

#include "tests/ggml/support.h"

namespace turboquant::conformance {
namespace {

/// Errors of ours since the last call.
std::vector<std::string> errors() {
    std::vector<std::string> ours;
    for (const LogLine& line : take_log_lines())
        if (line.level == GGML_LOG_LEVEL_ERROR && line.text.starts_with("turboquant: ")) ours.push_back(line.text);
    return ours;
}

struct Refused {
    const char* name;
    llama_flash_attn_type flash_attn;
    ggml_type k, v;
    std::vector<std::string> words;
};
class RefusedContext : public testing::TestWithParam<Refused> {};

TEST_P(RefusedContext, IsNotMadeAndTheLogSaysWhyOnce) {
    const Refused& r = GetParam();
    llama_model* model = demo("turbo4");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.flash_attn_type = r.flash_attn;
    params.type_k = r.k, params.type_v = r.v;
    errors();
    EXPECT_FALSE(ContextPtr(llama_init_from_model(model, params)));
    const std::vector<std::string> said = errors();
    ASSERT_EQ(said.size(), 1u) << testing::PrintToString(said);
    for (const std::string& word : r.words) EXPECT_NE(said[0].find(word), std::string::npos) << said[0];
    EXPECT_NE(last_error("turbo4"), "");
    // The next one is not held against it.
    const ContextPtr good = make_context(model);
    EXPECT_EQ(decode(good.get(), text_tokens(model, 20)).rows(), 20);
}

constexpr auto kOn = LLAMA_FLASH_ATTN_TYPE_ENABLED;
INSTANTIATE_TEST_SUITE_P(
    Cases, RefusedContext,
    testing::Values(Refused{"FlashAttentionOff", LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_TYPE_F16, GGML_TYPE_F16, {"-fa on"}},
                    Refused{"BothTypes", kOn, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, {"cache_k_l0", "q8_0", "-ctk", "-dev none"}},
                    Refused{"TypeOfValues", kOn, GGML_TYPE_F16, GGML_TYPE_Q4_0, {"cache_v_l0", "q4_0", "-ctv"}},
                    Refused{"FullPrecision", kOn, GGML_TYPE_F32, GGML_TYPE_F32, {"f32", "-ctk"}}),
    [](const auto& test) { return std::string(test.param.name); });

TEST(Refusals, AStateThatCannotComeBackIsSaidOnceOfTheRightTensor) {
    // Its keys were scaled, those here are not: its rows are lost, and no later request fails of it or says it again.
    const std::vector<llama_token> text = text_tokens(demo("turbo8"), 120);
    const ContextPtr saved = make_context(demo(kScaled));
    feed(saved.get(), text);
    std::vector<uint8_t> state(llama_state_seq_get_size(saved.get(), 0));
    llama_state_seq_get_data(saved.get(), state.data(), state.size(), 0);
    const ContextPtr ctx = make_context(demo("turbo8"));
    errors();
    llama_state_seq_set_data(ctx.get(), state.data(), state.size(), 0);
    std::vector<std::string> said = errors();
    for (int i = 0; i < 3; i++) {
        ASSERT_EQ(try_decode(ctx.get(), std::span(text).first(4), 120 + 4 * i), 0);
        for (const std::string& line : errors()) said.push_back(line);
    }
    ASSERT_EQ(said.size(), 1u) << testing::PrintToString(said);
    EXPECT_NE(said[0].find("cache_k_l0"), std::string::npos) << said[0];
    EXPECT_NE(said[0].find("the state was saved with a plan"), std::string::npos) << said[0];
    EXPECT_EQ(said[0].find("cannot", said[0].find("cannot") + 1), std::string::npos) << "not one refusal inside of another: " << said[0];
}

}  // namespace
}  // namespace turboquant::conformance
