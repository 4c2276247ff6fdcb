#include "turboquant/measure/evaluate.h"

#include <cmath>
#include <memory>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/parallel.h"

namespace turboquant::measure {
namespace {

/// Runs one chunk through a session and hands each piece of logits on: sink(index of the first scored position, count, logits). Scored are
/// positions n/2 .. n-2: the second half, except the last token, whose successor lies outside.
template <class Sink>
void run_chunk(llama::Session& session, std::span<const llama_token> chunk, int per_call, llama::Work& work, Sink&& sink) {
    const int n = static_cast<int>(chunk.size()), first = n / 2;
    session.clear();
    session.feed(chunk, 0, first, n - 1, per_call, &work, [&](int pos, int count, const float* logits) {
        sink(static_cast<std::size_t>(pos - first), static_cast<std::size_t>(count), logits);
    });
}

/// The text in chunks of n_ctx tokens, the first token of each replaced by BOS if the model wants one.
std::vector<llama_token> chunked_tokens(const llama_vocab* vocab, const EvalOptions& o) {
    if (llama_vocab_get_add_eos(vocab))
        throw llama::Error("this model's tokenizer ends every text with an end token; perplexity over chunks is not defined for it");
    std::vector<llama_token> tokens = llama::tokenize(vocab, llama::read_text_file(o.text_file), false);
    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx);
    const std::size_t n_chunks = std::min(tokens.size() / n_ctx, static_cast<std::size_t>(o.chunks));
    if (n_chunks == 0)
        throw llama::Error(fmt::format("text file '{}' has {} tokens, less than one chunk of {}; use a longer text or a smaller -c",
                                       o.text_file, tokens.size(), n_ctx));
    tokens.resize(n_chunks * n_ctx);
    if (llama_vocab_get_add_bos(vocab))
        for (std::size_t c = 0; c < n_chunks; c++) tokens[c * n_ctx] = llama_vocab_bos(vocab);
    return tokens;
}

}  // namespace

std::vector<EvalResult> evaluate(llama::ModelFile& file, EvalOptions o) {
    const KvArguments arguments(o.kv, o.windows);
    if (o.context.n_threads == 0) o.context.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const llama::CacheSpec f16 = llama::parse_cache_spec("f16");
    llama::ModelFile::Loaded plain = file.load(f16);
    const std::vector<llama_token> tokens = chunked_tokens(llama_model_get_vocab(plain.model.get()), o);
    std::vector<std::optional<Plan>> plans;
    const std::vector<llama::CacheSpec> specs =
        arguments.resolve(file, o.context.n_ctx, {.calib_file = o.calib_file, .n_threads = o.context.n_threads}, &plans);
    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx);
    const std::size_t n_chunks = tokens.size() / n_ctx, n_scored = n_ctx - 1 - n_ctx / 2;

    llama::Session reference(file, plain, f16, o.context);
    const auto note = [&](const std::string& line) { file.monitor().note(line); };
    note(fmt::format(
        "model {}: {} chunks of {} tokens{}, {} scored", file.path(), n_chunks, n_ctx,
        n_chunks < static_cast<std::size_t>(o.chunks) ? fmt::format(" (the text has no more than that; {} asked for)", o.chunks) : "",
        n_chunks * n_scored));
    note(fmt::format("reference {}, batch mode", reference.config()));
    std::vector<std::unique_ptr<llama::Session>> sessions;
    for (const llama::CacheSpec& spec : specs) {
        sessions.push_back(std::make_unique<llama::Session>(file, file.load(spec), spec, o.context));
        note(fmt::format("{}, {} mode", sessions.back()->config(), o.mode == EvalMode::batch ? "batch" : "decode"));
    }
    if (const int trained = llama_model_n_ctx_train(reference.model()); trained < o.context.n_ctx)
        note(fmt::format("warning: the model was trained on contexts of {} tokens only", trained));

    const auto n_vocab = static_cast<std::size_t>(reference.n_vocab());
    std::vector<float> ref_logits(n_scored * n_vocab);
    std::vector<std::vector<TokenScore>> scores(specs.size());
    llama::Work work(file.monitor(), "eval", static_cast<double>(tokens.size() * (specs.size() + 1)));
    for (std::size_t c = 0; c < n_chunks; c++) {
        const auto chunk = std::span(tokens).subspan(c * n_ctx, n_ctx);
        run_chunk(reference, chunk, 0, work, [&](std::size_t at, std::size_t n, const float* logits) {
            std::copy_n(logits, n * n_vocab, ref_logits.begin() + static_cast<std::ptrdiff_t>(at * n_vocab));
        });
        for (std::size_t s = 0; s < sessions.size(); s++) {
            std::vector<TokenScore>& out = scores[s];
            const std::size_t before = out.size();
            out.resize(before + n_scored);
            run_chunk(*sessions[s], chunk, o.mode == EvalMode::decode ? 1 : 0, work,
                      [&](std::size_t at, std::size_t n, const float* logits) {
                          const auto score = [&](std::size_t i) {
                              out[before + at + i] = score_token(std::span(ref_logits).subspan((at + i) * n_vocab, n_vocab),
                                                                 {logits + i * n_vocab, n_vocab}, chunk[n_ctx / 2 + at + i + 1]);
                          };
                          parallel_for(n, n > 1 ? o.context.n_threads : 1, score);
                      });
        }
    }
    std::vector<EvalResult> results;
    for (std::size_t s = 0; s < specs.size(); s++) {
        results.push_back({specs[s], sessions[s]->memory(), summarize(scores[s]), plans[s]});
        if (!std::isfinite(results.back().score.mean_kld) || !std::isfinite(results.back().score.ppl_ref))
            throw llama::Error(
                fmt::format("the model gave logits that are not numbers, with --kv {} or with f16; try other --kv and -ub, and report it",
                            specs[s].name));
    }
    return results;
}

}  // namespace turboquant::measure
