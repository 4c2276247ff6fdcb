// Text to calibrate on: every kind of it in every sequence, of one length.
#include "turboquant/llama/calibration.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "turboquant/llama/calibration_text.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/log.h"
#include "turboquant/llama/session.h"
#include "turboquant/llama/text.h"

namespace turboquant::llama {
namespace {

TEST(Calibration, TextOfPartsHoldsOfEveryPartItsShare) {
    install_log();
    ModelFile file(TQ_DEMO_MODEL, {});
    const std::shared_ptr<llama_model> model = file.model();
    const llama_vocab* vocab = llama_model_get_vocab(model.get());
    for (const int n_sequences : {1, 2})
        for (const int n_tokens : {256, 300, 1024, 1 << 20}) {
            const Calibration text = text_of_parts(vocab, calibration_parts(), n_sequences, n_tokens);
            ASSERT_EQ(text.sequences.size(), static_cast<std::size_t>(n_sequences));
            const std::size_t length = text.sequences[0].size(), each = calibration_parts().size() / text.sequences.size();
            EXPECT_LE(length, static_cast<std::size_t>(n_tokens));
            EXPECT_GE(length, std::min<std::size_t>(static_cast<std::size_t>(n_tokens) / 64 * 64, 512));
            for (std::size_t s = 0; s < text.sequences.size(); s++) {
                EXPECT_EQ(text.sequences[s].size(), length);
                for (std::size_t i = s * each; i < (s + 1) * each; i++) {
                    std::vector<llama_token> part = tokenize(vocab, calibration_parts()[i], false);
                    const std::span<const llama_token> beginning = std::span(part).subspan(1, length / each / 4);
                    EXPECT_NE(std::search(text.sequences[s].begin(), text.sequences[s].end(), beginning.begin(), beginning.end()),
                              text.sequences[s].end())
                        << "part " << i;
                }
            }
        }
    // What a plan is raced on is none of what it was measured on.
    for (const char* held : held_out_parts())
        for (const char* seen : calibration_parts()) EXPECT_STRNE(held, seen);
    const char* none[] = {"a"};
    EXPECT_THROW(text_of_parts(vocab, none, 1, 1024), Error);
}

}  // namespace
}  // namespace turboquant::llama
