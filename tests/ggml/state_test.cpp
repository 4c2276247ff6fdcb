// Saving and restoring state: whole contexts, sequences, files, between formats, into caches that are not empty.
#include <random>

#include "tests/ggml/support.h"

namespace turboquant::conformance {
namespace {

constexpr int kPrompt = 150, kSaid = 40;

using Bytes = std::vector<uint8_t>;

Bytes whole_state(llama_context* ctx) {
    Bytes b(llama_state_get_size(ctx));
    b.resize(llama_state_get_data(ctx, b.data(), b.size()));
    return b;
}

Bytes sequence_state(llama_context* ctx, llama_seq_id seq, llama_state_seq_flags flags = LLAMA_STATE_SEQ_FLAGS_NONE) {
    Bytes b(llama_state_seq_get_size_ext(ctx, seq, flags));
    b.resize(llama_state_seq_get_data_ext(ctx, b.data(), b.size(), seq, flags));
    return b;
}

void clear(llama_context* ctx) { llama_memory_clear(llama_get_memory(ctx), true); }

/// A prompt, and what the model says after it when nothing interrupts it.
class State : public testing::TestWithParam<std::string> {
  protected:
    void SetUp() override {
        model_ = demo(GetParam());
        prompt_ = text_tokens(model_, kPrompt);
        ctx_ = make_context(model_, {.n_seq_max = 3, .kv_unified = true});
        next_ = best_token(feed(ctx_.get(), prompt_).row(0));
    }
    std::vector<llama_token> go_on(llama_context* ctx, llama_seq_id seq = 0) const { return greedy(ctx, next_, kPrompt, kSaid, seq); }

    llama_model* model_ = nullptr;
    std::vector<llama_token> prompt_;
    ContextPtr ctx_;
    llama_token next_ = 0;
};

TEST_P(State, WholeContextIntoANewOne) {
    const Bytes state = whole_state(ctx_.get());
    const std::vector<llama_token> expected = go_on(ctx_.get());
    const ContextPtr other = make_context(model_, {.n_seq_max = 3, .kv_unified = true});
    ASSERT_EQ(llama_state_set_data(other.get(), state.data(), state.size()), state.size());
    EXPECT_EQ(whole_state(other.get()), state);
    EXPECT_EQ(go_on(other.get()), expected);
    // And back over itself, after it went on.
    ASSERT_EQ(llama_state_set_data(ctx_.get(), state.data(), state.size()), state.size());
    EXPECT_EQ(go_on(ctx_.get()), expected);
}

TEST_P(State, ItsSizeIsToldOnce) {
    take_log();
    const size_t size = whole_state(ctx_.get()).size();
    whole_state(ctx_.get());
    const std::string log = take_log();
    const size_t told = log.find("as large as f16's");
    EXPECT_EQ(told != std::string::npos, GetParam() != "f16") << size << log;
    if (told != std::string::npos) {
        EXPECT_EQ(log.find("as large as f16's", told + 1), std::string::npos) << log;
    }
}

TEST_P(State, SequenceFileErasedAndRestored) {
    const std::string file = temp_path("state-" + GetParam());
    const Bytes before = sequence_state(ctx_.get(), 0);
    ASSERT_GT(llama_state_seq_save_file(ctx_.get(), file.c_str(), 0, prompt_.data(), prompt_.size()), 0u);
    const std::vector<llama_token> expected = go_on(ctx_.get());
    // Another text takes its place, then the first comes back.
    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(ctx_.get()), 0, -1, -1));
    feed(ctx_.get(), text_tokens(model_, 260, 3));
    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(ctx_.get()), 0, -1, -1));
    std::vector<llama_token> tokens(1000);
    size_t n = 0;
    ASSERT_GT(llama_state_seq_load_file(ctx_.get(), file.c_str(), 0, tokens.data(), tokens.size(), &n), 0u);
    tokens.resize(n);
    EXPECT_EQ(tokens, prompt_);
    EXPECT_EQ(sequence_state(ctx_.get(), 0), before);
    EXPECT_EQ(go_on(ctx_.get()), expected);
    // Into another context, as another sequence.
    const ContextPtr other = make_context(model_, {.n_seq_max = 3, .kv_unified = true});
    tokens.resize(1000);
    ASSERT_GT(llama_state_seq_load_file(other.get(), file.c_str(), 2, tokens.data(), tokens.size(), &n), 0u);
    EXPECT_EQ(go_on(other.get(), 2), expected);
}

TEST_P(State, OnDeviceAndPartialFlags) {
    const Bytes on_device = sequence_state(ctx_.get(), 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE);
    const std::vector<llama_token> expected = go_on(ctx_.get());
    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(ctx_.get()), 0, kPrompt, -1));
    feed(ctx_.get(), text_tokens(model_, 100, 2), kPrompt);
    ASSERT_EQ(llama_state_seq_set_data_ext(ctx_.get(), on_device.data(), on_device.size(), 0, LLAMA_STATE_SEQ_FLAGS_ON_DEVICE),
              on_device.size());
    EXPECT_EQ(go_on(ctx_.get()), expected);

    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(ctx_.get()), 0, kPrompt, -1));
    const Bytes partial = sequence_state(ctx_.get(), 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    const std::vector<llama_token> again = go_on(ctx_.get());  // cut back by more than a token, the prompt's last ones are compressed
    ASSERT_TRUE(llama_memory_seq_rm(llama_get_memory(ctx_.get()), 0, kPrompt, -1));
    EXPECT_EQ(llama_state_seq_set_data_ext(ctx_.get(), partial.data(), partial.size(), 0, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY),
              partial.size());
    EXPECT_EQ(go_on(ctx_.get()), again);
}

TEST_P(State, IntoScatteredCells) {
    // A server's pool: cells freed in between other sequences'. A saved sequence comes back in runs as short as one cell.
    const Bytes state = sequence_state(ctx_.get(), 0);
    const llama_token one[] = {next_};
    const Logits reference = decode(ctx_.get(), one, kPrompt);
    for (const bool fresh : {false, true}) {
        // Of the same size: its windows are as long.
        const ContextPtr other = fresh ? make_context(model_, {.n_seq_max = 3, .kv_unified = true}) : nullptr;
        llama_context* ctx = fresh ? other.get() : ctx_.get();
        llama_memory_t memory = llama_get_memory(ctx);
        llama_memory_seq_rm(memory, 0, -1, -1);
        std::vector<BatchToken> mixed;  // two sequences in turn, runs of 1 and 2
        const std::vector<llama_token> a = text_tokens(model_, 300, 4), b = text_tokens(model_, 300, 5);
        for (int i = 0, j = 0; i < 300; i++) {
            mixed.push_back({a[static_cast<size_t>(i)], i, 1});
            if (i % 3 && j < 200) mixed.push_back({b[static_cast<size_t>(j)], j, 2}), j++;
        }
        decode(ctx, mixed, 512);
        ASSERT_TRUE(llama_memory_seq_rm(memory, 1, -1, -1));
        take_log();
        ASSERT_EQ(llama_state_seq_set_data(ctx, state.data(), state.size(), 0), state.size()) << take_log();
        EXPECT_EQ(take_log().find("cannot restore"), std::string::npos);
        EXPECT_EQ(sequence_state(ctx, 0), state);
        // In other cells sums are in another order: near-ties may fall otherwise, also in llama.cpp's own cache.
        EXPECT_LT(mean_kld(reference, decode(ctx, one, kPrompt)), 2e-3);
    }
}

TEST_P(State, AfterClearTheStateStillFits) {
    const Bytes state = sequence_state(ctx_.get(), 0);
    const std::vector<llama_token> expected = go_on(ctx_.get());
    clear(ctx_.get());
    ASSERT_EQ(llama_state_seq_set_data(ctx_.get(), state.data(), state.size(), 0), state.size());
    EXPECT_EQ(go_on(ctx_.get()), expected);
}

TEST_P(State, ShortStatesComeBack) {
    // Fewer tokens than what an offset is measured on, down to one.
    for (const int n : {1, 2, 5, 40}) {
        const ContextPtr one = make_context(model_), two = make_context(model_);
        const llama_token next = best_token(feed(one.get(), std::span(prompt_).first(static_cast<size_t>(n))).row(0));
        const Bytes state = sequence_state(one.get(), 0);
        ASSERT_EQ(llama_state_seq_set_data(two.get(), state.data(), state.size(), 0), state.size());
        EXPECT_EQ(greedy(two.get(), next, n, 20), greedy(one.get(), next, n, 20)) << n;
    }
}

TEST_P(State, TruncatedStateIsRefused) {
    const Bytes state = sequence_state(ctx_.get(), 0);
    const ContextPtr other = make_context(model_);
    EXPECT_EQ(llama_state_seq_set_data(other.get(), state.data(), state.size() / 2, 0), 0u);
    const llama_token next = best_token(feed(other.get(), prompt_).row(0));  // and the context lives on
    EXPECT_EQ(next, next_);
}

/// Ways in which the bytes of a state are damaged; rows are found by what llama.cpp's own format says: f16, so one row is as good as
/// another.
std::vector<Bytes> damaged(const Bytes& state) {
    std::vector<Bytes> all;
    std::mt19937 random(7);
    for (const size_t from : {size_t{400}, state.size() / 3, state.size() - 3000}) {
        Bytes zeroed = state, noise = state, flipped = state;
        std::fill(zeroed.begin() + static_cast<long>(from), zeroed.begin() + static_cast<long>(from + 2500), uint8_t{0});
        for (size_t i = from; i < from + 2500; i++) noise[i] = static_cast<uint8_t>(random());
        for (size_t i = from; i < state.size() - 16; i += 97) flipped[i] ^= 0x10;
        all.insert(all.end(), {zeroed, noise, flipped});
    }
    return all;
}

TEST_P(State, DamagedStateCostsItsOwnSequenceOnly) {
    if (GetParam() == "f16") GTEST_SKIP() << "llama.cpp's own cache has no way to see damage, and computes with it";
    const Bytes good = sequence_state(ctx_.get(), 0);
    const std::vector<llama_token> expected = go_on(ctx_.get());
    llama_memory_t memory = llama_get_memory(ctx_.get());
    for (const Bytes& bad : damaged(good)) {
        llama_memory_seq_rm(memory, 1, -1, -1);
        llama_memory_seq_rm(memory, 2, -1, -1);
        llama_state_seq_set_data(ctx_.get(), bad.data(), bad.size(), 1);
        // The sequence beside it, one that begins, and the damaged one itself are served.
        ASSERT_TRUE(llama_memory_seq_rm(memory, 0, kPrompt, -1));
        const llama_token next[] = {next_};
        EXPECT_EQ(try_decode(ctx_.get(), next, kPrompt), 0) << last_error(GetParam());
        EXPECT_EQ(try_decode(ctx_.get(), std::span(prompt_).first(50), 0, 2), 0) << last_error(GetParam());
        const llama_pos end = llama_memory_seq_pos_max(memory, 1) + 1;
        EXPECT_EQ(try_decode(ctx_.get(), next, end, 1), 0) << last_error(GetParam());
        // A good copy in its place is as good as ever.
        llama_memory_seq_rm(memory, -1, -1, -1);
        ASSERT_EQ(llama_state_seq_set_data(ctx_.get(), good.data(), good.size(), 0), good.size());
        EXPECT_EQ(sequence_state(ctx_.get(), 0), good);
        EXPECT_EQ(go_on(ctx_.get()), expected);
        llama_memory_seq_rm(memory, -1, -1, -1);
        ASSERT_EQ(llama_state_seq_set_data(ctx_.get(), good.data(), good.size(), 0), good.size());
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, State, testing::ValuesIn(with_f16()), [](const auto& test) { return test.param; });

/// State saved under one format and loaded under another: it is encoded anew, or decoding fails with a message.
struct Pair {
    const char *from, *to;
};
void PrintTo(const Pair& p, std::ostream* out) { *out << p.from << " to " << p.to; }

class Between : public testing::TestWithParam<Pair> {};

TEST_P(Between, WorksOrFailsVisibly) {
    const auto [from, to] = GetParam();
    const std::vector<llama_token> text = text_tokens(demo(from), 300);
    const auto head = std::span(text).first(250), tail = std::span(text).subspan(250);
    const ContextPtr saved = make_context(demo(from));
    feed(saved.get(), head);
    const Bytes state = sequence_state(saved.get(), 0);
    const Logits reference = decode(saved.get(), tail, 250);

    const ContextPtr loaded = make_context(demo(to));
    take_log();
    const size_t taken = llama_state_seq_set_data(loaded.get(), state.data(), state.size(), 0);
    const int failed = try_decode(loaded.get(), tail, 250);
    if (taken == 0 || failed || take_log().find("cannot restore") != std::string::npos) {
        EXPECT_TRUE(std::string(to) == "f16" || (!failed && last_error(to) != "")) << "lost rows are told, and stop nobody";
        clear(loaded.get());  // then it works again
        EXPECT_EQ(try_decode(loaded.get(), head), 0);
        return;
    }
    clear(loaded.get());
    ASSERT_EQ(llama_state_seq_set_data(loaded.get(), state.data(), state.size(), 0), state.size());
    const Logits logits = decode(loaded.get(), tail, 250);
    const double kld = mean_kld(reference, logits);
    if (std::string(to) == "f16" && std::string(from) != "raw") {
        EXPECT_FALSE(kld < 1) << "packed rows must not look like f16: NaN, or nonsense that anybody sees";
    } else {
        EXPECT_LT(kld, std::string(to) == "turbo2" ? 0.5 : 0.1);
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, Between,
                         testing::Values(Pair{"turbo4", "turbo3"}, Pair{"turbo3", "turbo4"}, Pair{"f16", "turbo4"}, Pair{"raw", "turbo4"},
                                         Pair{"turbo4", "raw"}, Pair{"raw", "f16"}, Pair{"f16", "raw"}, Pair{"turbo4", "f16"},
                                         Pair{"turbo8", "turbo2"}, Pair{"tcq3", "turbo4"}, Pair{"turbo4", "tcq3"}, Pair{"tcq3", "raw"},
                                         Pair{"scaled", "turbo8"}, Pair{"turbo8", "scaled"}, Pair{"scaled", "f16"}, Pair{"f16", "scaled"},
                                         Pair{"mixed", "turbo4"}, Pair{"turbo4", "mixed"}, Pair{"mixed", "f16"}, Pair{"f16", "mixed"}),
                         [](const auto& test) { return std::string(test.param.from) + "To" + test.param.to; });

}  // namespace
}  // namespace turboquant::conformance
