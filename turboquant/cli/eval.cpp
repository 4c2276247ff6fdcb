// `turboquant eval`: what a cache format costs in perplexity and KL divergence, against the same model with llama.cpp's own f16 cache.
// Chunks, scored positions and statistics are those of llama-perplexity --kl-divergence.
#include "turboquant/cli/eval.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <thread>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/parallel.h"
#include "turboquant/cli/table.h"
#include "turboquant/cli/text.h"

namespace turboquant::cli {
namespace {

/// Runs one chunk through a session and hands each piece of logits on: sink(first position, count, logits). Scored are positions
/// n/2 .. n-2: the second half, except the last token, whose successor lies outside.
template <class Sink>
void run_chunk(Session& session, std::span<const llama_token> chunk, std::size_t tokens_per_call, ProgressBar& bar, Sink&& sink) {
    const int n = static_cast<int>(chunk.size()), first = n / 2, end = n - 1;
    session.clear();
    for (std::size_t at = 0; at < chunk.size(); at += tokens_per_call) {
        const auto piece = chunk.subspan(at, std::min(tokens_per_call, chunk.size() - at));
        const int pos = static_cast<int>(at), from = std::max(pos, first), to = std::min(pos + static_cast<int>(piece.size()), end);
        const float* logits = session.decode(piece, pos, first, end);
        if (logits) sink(static_cast<std::size_t>(from - first), static_cast<std::size_t>(to - from), logits);
        bar.add(static_cast<double>(piece.size()));
    }
}

std::string to_table(const std::vector<EvalResult>& results) {
    std::vector<std::vector<std::string>> rows{
        {"kv", "bits/value", "KV MiB", "PPL", "PPL f16", "mean KLD", "median KLD", "99% KLD", "99.9% KLD", "same top %"}};
    for (const EvalResult& r : results)
        rows.push_back({r.spec.name, fmt::format("{:.3f}", r.memory.bits_per_value), fmt::format("{:.2f}", r.memory.bytes / (1 << 20)),
                        fmt::format("{:.4f}", r.score.ppl), fmt::format("{:.4f}", r.score.ppl_ref), fmt::format("{:.6f}", r.score.mean_kld),
                        fmt::format("{:.6f}", r.score.median_kld), fmt::format("{:.6f}", r.score.kld_99),
                        fmt::format("{:.6f}", r.score.kld_999), fmt::format("{:.2f}", 100 * r.score.same_top)});
    return format_table(rows);
}

/// The text in chunks of n_ctx tokens, the first token of each replaced by BOS if the model wants one.
std::vector<llama_token> chunked_tokens(const llama_vocab* vocab, const EvalOptions& o) {
    if (llama_vocab_get_add_eos(vocab))
        throw CommandError("this model's tokenizer ends every text with an end token; perplexity over chunks is not defined for it");
    std::vector<llama_token> tokens = tokenize(vocab, read_text_file(o.text_file), false);
    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx);
    const std::size_t n_chunks = std::min(tokens.size() / n_ctx, static_cast<std::size_t>(o.chunks));
    if (n_chunks == 0)
        throw CommandError(fmt::format("text file '{}' has {} tokens, less than one chunk of {}; use a longer text or a smaller -c",
                                       o.text_file, tokens.size(), n_ctx));
    tokens.resize(n_chunks * n_ctx);
    if (llama_vocab_get_add_bos(vocab))
        for (std::size_t c = 0; c < n_chunks; c++) tokens[c * n_ctx] = llama_vocab_bos(vocab);
    return tokens;
}

}  // namespace

std::vector<EvalResult> evaluate(ModelFile& file, EvalOptions o) {
    const KvArguments arguments(o.kv, o.windows);
    if (o.context.n_threads == 0) o.context.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const CacheSpec f16 = parse_cache_spec("f16");
    ModelFile::Loaded plain = file.load(f16);
    const std::vector<llama_token> tokens = chunked_tokens(llama_model_get_vocab(plain.model.get()), o);
    std::vector<std::optional<Plan>> plans;
    const std::vector<CacheSpec> specs =
        arguments.resolve(file, o.model, o.context.n_ctx, {.calib_file = o.calib_file, .n_threads = o.context.n_threads}, &plans);
    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx);
    const std::size_t n_chunks = tokens.size() / n_ctx, n_scored = n_ctx - 1 - n_ctx / 2;

    Session reference(file, plain, f16, o.context);
    fmt::print(
        stderr, "model {}: {} chunks of {} tokens{}, {} scored\nreference {}, batch mode\n", o.model, n_chunks, n_ctx,
        n_chunks < static_cast<std::size_t>(o.chunks) ? fmt::format(" (the text has no more than that; {} asked for)", o.chunks) : "",
        n_chunks * n_scored, reference.config());
    std::vector<std::unique_ptr<Session>> sessions;
    for (const CacheSpec& spec : specs) {
        sessions.push_back(std::make_unique<Session>(file, file.load(spec), spec, o.context));
        fmt::print(stderr, "{}, {} mode\n", sessions.back()->config(), o.mode == EvalMode::batch ? "batch" : "decode");
    }
    if (const int trained = llama_model_n_ctx_train(reference.model()); trained < o.context.n_ctx)
        fmt::print(stderr, "warning: the model was trained on contexts of {} tokens only\n", trained);

    const auto n_vocab = static_cast<std::size_t>(reference.n_vocab());
    std::vector<float> ref_logits(n_scored * n_vocab);
    std::vector<std::vector<TokenScore>> scores(specs.size());
    ProgressBar bar("eval", static_cast<double>(tokens.size() * (specs.size() + 1)));
    for (std::size_t c = 0; c < n_chunks; c++) {
        const auto chunk = std::span(tokens).subspan(c * n_ctx, n_ctx);
        run_chunk(reference, chunk, llama_n_batch(reference.context()), bar, [&](std::size_t at, std::size_t n, const float* logits) {
            std::copy_n(logits, n * n_vocab, ref_logits.begin() + static_cast<std::ptrdiff_t>(at * n_vocab));
        });
        for (std::size_t s = 0; s < sessions.size(); s++) {
            std::vector<TokenScore>& out = scores[s];
            const std::size_t before = out.size();
            out.resize(before + n_scored);
            const std::size_t per_call = o.mode == EvalMode::decode ? 1 : llama_n_batch(sessions[s]->context());
            run_chunk(*sessions[s], chunk, per_call, bar, [&](std::size_t at, std::size_t n, const float* logits) {
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
            throw CommandError(
                fmt::format("the model gave logits that are not numbers, with --kv {} or with f16; try other --kv and -ub, and report it",
                            specs[s].name));
    }
    return results;
}

nlohmann::ordered_json to_json(const std::vector<EvalResult>& results) {
    auto rows = nlohmann::ordered_json::array();
    for (const EvalResult& r : results)
        rows.push_back({{"kv", r.spec.name},
                        {"bits_per_value", r.memory.bits_per_value},
                        {"kv_bytes", static_cast<std::int64_t>(r.memory.bytes)},
                        {"ppl", r.score.ppl},
                        {"ppl_f16", r.score.ppl_ref},
                        {"mean_kld", r.score.mean_kld},
                        {"median_kld", r.score.median_kld},
                        {"kld_99", r.score.kld_99},
                        {"kld_999", r.score.kld_999},
                        {"same_top", r.score.same_top},
                        {"tokens", r.score.tokens}});
    return rows;
}

void add_eval(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<EvalOptions>();
    CLI::App* cmd = app.add_subcommand("eval", "Perplexity and KL divergence of KV cache formats against llama.cpp's own f16 cache");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->text_file, "Text to evaluate on")->required();
    cmd->add_option("--kv", o->kv, "KV cache formats, any number: see `turboquant formats`, or auto:BITS, auto:SIZE, PLAN.json")
        ->required();
    add_window_options(*cmd, o->windows);
    cmd->add_option("--calib", o->calib_file, "Text on which auto: measures (default: the model writes one)");
    cmd->add_option("-c,--ctx-size", o->context.n_ctx, "Tokens per chunk; the second half of each is scored")
        ->check(CLI::Range(8, 1 << 30))
        ->capture_default_str();
    cmd->add_option("--chunks", o->chunks, "Chunks of the text, at most")->check(CLI::Range(1, 1 << 30))->capture_default_str();
    cmd->add_option("--mode", o->mode, "batch: many tokens per call; decode: one token per call (the f16 reference stays in batch mode)")
        ->transform(CLI::CheckedTransformer(std::map<std::string, EvalMode>{{"batch", EvalMode::batch}, {"decode", EvalMode::decode}}));
    cmd->add_option("-t,--threads", o->context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_option("-b,--batch-size", o->context.n_batch, "Tokens per call")->check(CLI::Range(1, 1 << 20))->capture_default_str();
    cmd->add_option("--ubatch-size", o->context.n_ubatch, "Tokens computed at once (also -ub)")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    cmd->add_flag("--json", o->json, "Print a JSON array instead of a table");
    cmd->callback([o, &global] {
        ModelFile file(o->model, global);
        const std::vector<EvalResult> results = evaluate(file, *o);
        fmt::print("{}", o->json ? to_json(results).dump(2) + "\n" : to_table(results));
    });
}

}  // namespace turboquant::cli
