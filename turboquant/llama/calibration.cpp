#include "turboquant/llama/calibration.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "fmt/format.h"
#include "turboquant/codec/random.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/log.h"
#include "turboquant/llama/text.h"

namespace turboquant::llama {
namespace {

constexpr std::size_t kLengthUnit = 64;

/// What a text begins with: the model's beginning, else its end (between documents in training), else a line break.
llama_token first_token(const llama_vocab* vocab) {
    for (const llama_token t : {llama_vocab_bos(vocab), llama_vocab_eos(vocab), llama_vocab_nl(vocab)})
        if (t != LLAMA_TOKEN_NULL) return t;
    return 0;
}

/// Draws from softmax(logits).
llama_token sample(std::span<const float> logits, SplitMix64& random, std::vector<double>& weights) {
    float top = logits[0];
    for (const float l : logits) top = std::max(top, l);
    double sum = 0;
    weights.resize(logits.size());
    for (std::size_t i = 0; i < logits.size(); i++) sum += weights[i] = std::exp(static_cast<double>(logits[i]) - top);
    double left = random.uniform() * sum;
    std::size_t i = 0;
    while (i + 1 < logits.size() && (left -= weights[i]) > 0) i++;
    return static_cast<llama_token>(i);
}

}  // namespace

Calibration generate_text(llama_model* model, int n_sequences, int n_tokens, std::uint32_t seed, int n_threads, const Monitor& monitor) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(n_sequences * ((n_tokens + 255) / 256 * 256));
    params.n_seq_max = static_cast<std::uint32_t>(n_sequences);
    params.n_batch = params.n_ubatch = params.n_seq_max;
    params.n_threads = params.n_threads_batch = n_threads;
    params.no_perf = true;
    take_log_problems();
    const std::unique_ptr<llama_context, decltype(&llama_free)> context(llama_init_from_model(model, params), llama_free);
    if (!context)
        throw Error(fmt::format("llama.cpp could not make a context to write calibration text; give a text with --calib FILE{}",
                                take_log_problems()));
    const llama_vocab* vocab = llama_model_get_vocab(model);
    const auto n_vocab = static_cast<std::size_t>(llama_vocab_n_tokens(vocab));
    llama_batch batch = llama_batch_init(n_sequences, 0, 1);
    const std::unique_ptr<llama_batch, void (*)(llama_batch*)> owner(&batch, [](llama_batch* b) { llama_batch_free(*b); });

    const auto n = static_cast<std::size_t>(n_sequences);
    Calibration text{fmt::format("written by the model, seed {}", seed), {n, {first_token(vocab)}}};
    std::vector<SplitMix64> random;
    for (std::size_t s = 0; s < n; s++) random.emplace_back(seed + (static_cast<std::uint64_t>(s) << 32));
    std::vector<double> weights;
    Work work(monitor, "calibration text", n_tokens);
    for (int pos = 0; pos + 1 < n_tokens; pos++) {
        batch.n_tokens = n_sequences;
        for (std::size_t s = 0; s < n; s++) {
            batch.token[s] = text.sequences[s].back();
            batch.pos[s] = pos;
            batch.n_seq_id[s] = 1;
            batch.seq_id[s][0] = static_cast<llama_seq_id>(s);
            batch.logits[s] = true;
        }
        if (const int rc = llama_decode(context.get(), batch); rc != 0)
            throw Error(fmt::format("llama.cpp failed to write calibration text (code {}); give a text with --calib FILE{}", rc,
                                    take_log_problems()));
        for (std::size_t s = 0; s < n; s++) {
            const llama_token t = sample({llama_get_logits_ith(context.get(), static_cast<std::int32_t>(s)), n_vocab}, random[s], weights);
            text.sequences[s].push_back(llama_vocab_is_eog(vocab, t) ? first_token(vocab) : t);
        }
        work.add(1);
    }
    return text;
}

Calibration text_of_parts(const llama_vocab* vocab, std::span<const char* const> parts, int n_sequences, int n_tokens) {
    const auto n = std::clamp<std::size_t>(static_cast<std::size_t>(n_sequences), 1, parts.size());
    std::vector<std::vector<std::vector<llama_token>>> dealt(n);  // by sequence and part
    auto length = static_cast<std::size_t>(n_tokens);
    for (std::size_t s = 0; s < n; s++) {
        std::size_t total = 0;
        for (std::size_t i = s * parts.size() / n; i < (s + 1) * parts.size() / n; i++) {
            std::vector<llama_token> tokens = tokenize(vocab, parts[i], false);
            if (!dealt[s].empty() && llama_vocab_get_add_bos(vocab)) tokens.erase(tokens.begin());
            total += tokens.size();
            dealt[s].push_back(std::move(tokens));
        }
        length = std::min(length, total);
    }
    length = length / kLengthUnit * kLengthUnit;
    if (length == 0) throw Error("the text gives too few tokens; give another with --calib FILE");
    Calibration text{"text of several kinds", {}};
    for (const auto& sequence : dealt) {
        std::size_t total = 0, left = length;
        for (const auto& part : sequence) total += part.size();
        std::vector<llama_token>& tokens = text.sequences.emplace_back();
        for (const auto& part : sequence) {
            const bool last = &part == &sequence.back();
            const std::size_t share = last ? left : std::min(left, part.size() * length / total);
            const std::size_t taken = std::min(share, part.size());
            tokens.insert(tokens.end(), part.begin(), part.begin() + static_cast<std::ptrdiff_t>(taken));
            left -= taken;
        }
        while (tokens.size() < length) tokens.push_back(tokens[tokens.size() - sequence.back().size()]);  // rounding's one or two
    }
    return text;
}

Calibration text_from_file(const llama_vocab* vocab, const std::string& path, int n_sequences, int n_tokens) {
    const std::vector<llama_token> tokens = tokenize(vocab, read_text_file(path), false);
    const auto length = static_cast<std::size_t>(n_tokens);
    if (tokens.size() < length)
        throw Error(
            fmt::format("calibration text '{}' has {} tokens, fewer than the {} needed; give a longer one", path, tokens.size(), n_tokens));
    const std::size_t n = std::min(static_cast<std::size_t>(n_sequences), tokens.size() / length);
    Calibration text{fmt::format("file {}", path), {}};
    for (std::size_t s = 0; s < n; s++) {
        const std::size_t at = n > 1 ? s * (tokens.size() - length) / (n - 1) : 0;
        text.sequences.emplace_back(tokens.begin() + static_cast<std::ptrdiff_t>(at),
                                    tokens.begin() + static_cast<std::ptrdiff_t>(at + length));
        if (llama_vocab_get_add_bos(vocab)) text.sequences.back()[0] = llama_vocab_bos(vocab);
    }
    return text;
}

}  // namespace turboquant::llama
