// A session with a model: a text decoded in pieces is the text decoded at once.
#include "turboquant/llama/session.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "turboquant/llama/log.h"
#include "turboquant/llama/text.h"

namespace turboquant::llama {
namespace {

constexpr int kTokens = 300, kFirst = 100;

/// Logits of the tokens from kFirst on, decoded at most per_call at a time.
std::vector<float> logits_of(Session& session, const std::vector<llama_token>& tokens, int per_call) {
    session.clear();
    std::vector<float> all;
    int next = kFirst;
    session.feed(tokens, 0, kFirst, kTokens, per_call, nullptr, [&](int first, int n, const float* logits) {
        EXPECT_EQ(first, next) << "each once, in order";
        next += n;
        all.insert(all.end(), logits, logits + static_cast<std::ptrdiff_t>(n) * session.n_vocab());
    });
    EXPECT_EQ(next, kTokens);
    return all;
}

double difference(const std::vector<float>& x, const std::vector<float>& of) {
    EXPECT_EQ(x.size(), of.size());
    double diff = 0, norm = 0;
    for (std::size_t i = 0; i < std::min(x.size(), of.size()); i++) diff += std::pow(x[i] - of[i], 2), norm += std::pow(of[i], 2);
    return std::sqrt(diff / norm);
}

TEST(Session, PiecesAreTheWhole) {
    install_log();
    // With weights in F16 another order of sums is all that differs.
    ModelFile file(TQ_DEMO_MODEL, {.f16_weights = true, .n_threads = 1});
    Session session(file, parse_cache_spec("f16"), {.n_ctx = 512, .n_batch = 512, .n_threads = 1});
    std::vector<llama_token> tokens = tokenize(session.vocab(), read_text_file(TQ_TEST_DATA "/written_by_demo.txt"), true);
    ASSERT_GT(tokens.size(), static_cast<std::size_t>(kTokens));
    tokens.resize(kTokens);
    const std::vector<float> whole = logits_of(session, tokens, 0);
    for (const int per_call : {64, 17, 1}) EXPECT_LT(difference(logits_of(session, tokens, per_call), whole), 2e-3) << per_call;
    std::swap(tokens[64], tokens[65]);
    EXPECT_GT(difference(logits_of(session, tokens, 64), whole), 4e-3) << "two tokens that changed places are seen";
}

}  // namespace
}  // namespace turboquant::llama
