// Two contexts at work at the same time on one device, as a server's slots or an application's threads have it.
// scripts/test-preset tsan runs this under the thread sanitizer, which sees our code (llama.cpp's own is not compiled with it).
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/ggml/support.h"
#include "turboquant/ggml/plugin.h"

#if defined(__SANITIZE_THREAD__)
/// What llama.cpp's libraries do is not seen, so neither is what orders it: the threads of a node, which they start and hold together, least
/// of all (tests/host has those on threads of our own).
constexpr int kThreads[] = {1};
extern "C" const char* __tsan_default_suppressions() {
    return "called_from_lib:libllama.so\ncalled_from_lib:libggml-base.so\ncalled_from_lib:libggml-cpu.so\ncalled_from_lib:libggml.so\n";
}
#else
constexpr int kThreads[] = {1, 2};
#endif

namespace turboquant::conformance {
namespace {

/// A context's whole life: made, a prompt, a few tokens one by one, its state saved and restored, a few more.
Logits life(llama_model* model, int variant, int n_threads) {
    const ContextPtr ctx = make_context(model, {.n_ctx = 256, .n_threads = n_threads});
    const std::vector<llama_token> text = text_tokens(model, 100, variant);
    Logits all = decode(ctx.get(), std::span(text).first(80));
    std::vector<uint8_t> state(llama_state_get_size(ctx.get()));
    state.resize(llama_state_get_data(ctx.get(), state.data(), state.size()));
    all.append(decode(ctx.get(), std::span(text).subspan(80, 10), 80, 0, 1));
    if (llama_state_set_data(ctx.get(), state.data(), state.size()) != state.size()) throw std::runtime_error("no state came back");
    all.append(decode(ctx.get(), std::span(text).subspan(80, 20), 80, 0, 1));
    return all;
}

class Concurrency : public testing::TestWithParam<std::string> {};

TEST_P(Concurrency, TwoContextsOfOneDeviceDecodeAtOnce) {
    llama_model* model = demo(GetParam());
    for (const int n_threads : kThreads) {
        const Logits alone[] = {life(model, 0, n_threads), life(model, 1, n_threads)};
        ASSERT_GT(max_difference(alone[0], alone[1]), 0.1) << "the test would not notice contexts that exchange their caches";
        Logits together[2];
        std::string error[2];
        std::vector<std::thread> threads;
        std::atomic<int> alive = 2;
        for (int i = 0; i < 2; i++)
            threads.emplace_back([&, i] {
                try {
                    for (int round = 0; round < 2; round++) together[i] = life(model, i, n_threads);
                } catch (const std::exception& e) {
                    error[i] = e.what();
                }
                alive--;
            });
        // And somebody who looks on.
        const auto stats = procedure<turboquant_kv_stats_t>("turboquant_kv_stats");
        const auto config = procedure<turboquant_config_t>("turboquant_config");
        const auto last_error = procedure<turboquant_last_error_t>("turboquant_last_error");
        const std::string before = last_error(device(GetParam()));  // of a test before this one
        turboquant_kv_stats most{};
        while (alive > 0) {
            turboquant_kv_stats s{};
            stats(device(GetParam()), &s);
            if (s.n_tensors > most.n_tensors) most = s;
            EXPECT_NE(std::string(config(device(GetParam()))), "");
            EXPECT_EQ(std::string(last_error(device(GetParam()))), before);
            std::this_thread::yield();
        }
        for (std::thread& t : threads) t.join();
        for (int i = 0; i < 2; i++) {
            ASSERT_EQ(error[i], "");
            EXPECT_EQ(max_difference(alone[i], together[i]), 0) << "context " << i << ", " << n_threads << " threads";
        }
        EXPECT_GT(most.n_tensors, 0u);
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, Concurrency, testing::Values("turbo4", "tcq3"), [](const auto& test) { return test.param; });

}  // namespace
}  // namespace turboquant::conformance
