// State of a sequence that holds an image: with M-RoPE all tokens of an image share one temporal position.
#include <cmath>

#include "tests/ggml/support.h"
#include "tests/ggml/tiny_models.h"

namespace turboquant::conformance {
namespace {

constexpr int kSide = 8;  ///< of the image, in tokens

std::string qwen2vl() {
    for (const TinyModel& m : tiny_models())
        if (m.name == "qwen2vl") return write_tiny_model(m, temp_path(""));
    return {};
}

/// An image at temporal position pos. Throws std::runtime_error if llama_decode fails.
void feed_image(llama_context* ctx, llama_pos pos) {
    const int n = kSide * kSide, n_embd = llama_model_n_embd(llama_get_model(ctx));
    std::vector<float> x(static_cast<size_t>(n) * n_embd);
    for (size_t i = 0; i < x.size(); i++) x[i] = std::sin(static_cast<float>(i * i % 1009));
    std::vector<llama_pos> at(static_cast<size_t>(4 * n));
    for (int i = 0; i < n; i++) at[i] = pos, at[n + i] = pos + i / kSide, at[2 * n + i] = pos + i % kSide;
    std::vector<int32_t> n_seq(static_cast<size_t>(n), 1);
    llama_seq_id zero = 0;
    std::vector<llama_seq_id*> seq(static_cast<size_t>(n), &zero);
    std::vector<int8_t> logits(static_cast<size_t>(n), 0);
    llama_batch batch{};
    batch.n_tokens = n, batch.embd = x.data(), batch.pos = at.data(), batch.n_seq_id = n_seq.data(), batch.seq_id = seq.data(),
    batch.logits = logits.data();
    if (llama_decode(ctx, batch) != 0) throw std::runtime_error("llama_decode of an image failed");
}

class ImageState : public testing::TestWithParam<std::string> {};

TEST_P(ImageState, ComesBackAsUninterrupted) {
    const ModelPtr model = load_model(qwen2vl(), GetParam());
    for (const int text : {0, 10, 60, 63, 200}) {
        const ContextPtr one = make_context(model.get(), {.n_threads = 1}), two = make_context(model.get(), {.n_threads = 1});
        if (text) feed(one.get(), random_tokens(kTinyVocab, text, 5));
        feed_image(one.get(), text);
        feed(one.get(), random_tokens(kTinyVocab, 100, 6), text + kSide);
        std::vector<uint8_t> state(llama_state_seq_get_size(one.get(), 0)), again(state.size());
        ASSERT_EQ(llama_state_seq_get_data(one.get(), state.data(), state.size(), 0), state.size());
        ASSERT_EQ(llama_state_seq_set_data(two.get(), state.data(), state.size(), 0), state.size());
        ASSERT_EQ(llama_state_seq_get_data(two.get(), again.data(), again.size(), 0), state.size());
        EXPECT_EQ(again, state) << text << " tokens of text before the image";
        const std::vector<llama_token> tokens = random_tokens(kTinyVocab, 20, 7);
        const llama_pos next = text + kSide + 100;
        EXPECT_EQ(max_difference(decode(one.get(), tokens, next), decode(two.get(), tokens, next)), 0)
            << text << " tokens of text before the image";
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, ImageState, testing::Values("f16", "turbo4", "turbo8", "tcq3"),
                         [](const auto& test) { return test.param; });

}  // namespace
}  // namespace turboquant::conformance
