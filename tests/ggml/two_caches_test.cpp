// Steps of a model with two caches (sliding window and not) when both have more cells than the step before: on a GPU new plans are made then,
// one of them in the midst of a graph whose launches wait. And a prompt in two batches, of which the second is encoded beside attention.
#include <algorithm>

#include "tests/ggml/support.h"
#include "tests/ggml/tiny_models.h"

namespace turboquant::conformance {
namespace {

TEST(TwoCaches, StepsWithMoreCellsAreAsInABatch) {
    constexpr int kFirst = 100, kPrompt = 250, kSteps = 12;  // llama.cpp has cells by 256
    const std::vector<TinyModel> models = tiny_models();
    const auto gemma = std::ranges::find(models, "gemma2", &TinyModel::name);
    ASSERT_NE(gemma, models.end());
    const std::string path = write_tiny_model(*gemma, temp_path(""));
    const ModelPtr compressed = load_model(path, "turbo4"), plain = load_model(path, "f16");
    const auto run = [&](const ModelPtr& model, int step) {
        const ContextPtr ctx = make_context(model.get(), {.n_threads = 1});
        feed(ctx.get(), random_tokens(kTinyVocab, kFirst, 3));
        decode(ctx.get(), random_tokens(kTinyVocab, kPrompt - kFirst, 5), kFirst);
        return decode(ctx.get(), random_tokens(kTinyVocab, kSteps, 4), kPrompt, 0, step);
    };
    const Logits reference = run(plain, kSteps), batch = run(compressed, kSteps), single = run(compressed, 1);
    const double cost = mean_kld(reference, batch), of_steps = mean_kld(reference, single);
    RecordProperty("cost_e6", std::to_string(1e6 * cost));
    EXPECT_LT(cost, 6e-3);  // 2.5e-3 where this was written, on a GPU of the host 2.9e-3
    EXPECT_GT(cost, 1.2e-3);
    EXPECT_NEAR(of_steps, cost, 0.3 * cost);
}

}  // namespace
}  // namespace turboquant::conformance
