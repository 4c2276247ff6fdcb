// `turboquant run`: text from a prompt, and what it cost.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/llama/session.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/kv_resolve.h"

namespace turboquant::cli {
namespace {

using namespace llama;
using measure::KvArguments;

struct RunOptions {
    std::string model, prompt, prompt_file, kv{kCodecs[0].name}, calib_file;
    WindowSizes windows;
    GpuOptions gpu;
    ContextOptions context{.n_ctx = 0};
    int n_predict = 128, top_k = 40;
    float temp = 0, top_p = 0.95f, min_p = 0.05f;
    std::uint32_t seed = 1;
    bool ignore_eos = false, echo = false;
};

using SamplerPtr = std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)>;

SamplerPtr make_sampler(const RunOptions& o) {
    SamplerPtr chain(llama_sampler_chain_init(llama_sampler_chain_default_params()), llama_sampler_free);
    const auto add = [&](llama_sampler* s) { llama_sampler_chain_add(chain.get(), s); };
    if (o.temp <= 0) {
        add(llama_sampler_init_greedy());
        return chain;
    }
    if (o.top_k > 0) add(llama_sampler_init_top_k(o.top_k));
    if (o.top_p < 1) add(llama_sampler_init_top_p(o.top_p, 1));
    if (o.min_p > 0) add(llama_sampler_init_min_p(o.min_p, 1));
    add(llama_sampler_init_temp(o.temp));
    add(llama_sampler_init_dist(o.seed));
    return chain;
}

std::string rate(std::size_t n, std::int64_t us) {
    return n == 0 || us <= 0 ? fmt::format("{} tokens", n)
                             : fmt::format("{} tokens in {:.2f} s, {:.2f} tokens/s", n, static_cast<double>(us) * 1e-6,
                                           static_cast<double>(n) * 1e6 / static_cast<double>(us));
}

void print_memory(const Session& session) {
    const KvMemory m = session.memory();
    const auto mib = [](double bytes) { return bytes / (1 << 20); };
    fmt::print(stderr,
               "kv cache:   {} {:.1f} bytes/token, {:.2f} MiB for {} tokens; f16 {:.1f} bytes/token, {:.2f} MiB; {:.3f} of f16, {:.3f} "
               "bits/value\n",
               session.spec().name, m.bytes_per_token, mib(m.bytes), llama_n_ctx(session.context()), m.f16_bytes_per_token,
               mib(m.f16_bytes), m.bytes / m.f16_bytes, m.bits_per_value);
}

/// Text made from NaN would look like any other. Models may rule tokens out with minus infinity.
void check_logits(const Session& session) {
    const float* logits = llama_get_logits_ith(session.context(), -1);
    const int n = llama_vocab_n_tokens(session.vocab());
    if (std::any_of(logits, logits + n, [](float x) { return std::isnan(x) || x == std::numeric_limits<float>::infinity(); }) ||
        std::none_of(logits, logits + n, [](float x) { return std::isfinite(x); }))
        throw CommandError("the model's logits are not numbers; if --kv f16 gives text, please report it with the model");
}

void run(RunOptions o, const GlobalOptions& global) {
    const KvArguments arguments({o.kv}, o.windows);
    const std::string prompt = o.prompt_file.empty() ? o.prompt : read_text_file(o.prompt_file);
    if (prompt.empty()) throw CommandError("the prompt is empty; give one with -p TEXT or -f FILE");
    ModelFile file = open_model(o.model, global, o.gpu);
    const CacheSpec spec = arguments.resolve(file, o.context.n_ctx, {.calib_file = o.calib_file, .n_threads = o.context.n_threads}).at(0);
    const std::shared_ptr<llama_model> model = file.model();
    const std::vector<llama_token> tokens = tokenize(llama_model_get_vocab(model.get()), prompt, true);
    const auto needed = tokens.size() + static_cast<std::size_t>(o.n_predict);
    if (o.context.n_ctx == 0) o.context.n_ctx = static_cast<int>((needed + 255) / 256 * 256);
    if (needed > static_cast<std::size_t>(o.context.n_ctx))
        throw CommandError(
            fmt::format("a prompt of {} tokens and {} to generate do not fit into a context of {}; use -c {} or more, or a smaller -n",
                        tokens.size(), o.n_predict, o.context.n_ctx, needed));
    Session session(file, spec, o.context);
    const int trained = llama_model_n_ctx_train(session.model());
    fmt::print(
        stderr, "{}; {}\n", session.config(),
        o.temp <= 0 ? "greedy" : fmt::format("temp {}, top-k {}, top-p {}, min-p {}, seed {}", o.temp, o.top_k, o.top_p, o.min_p, o.seed));
    if (static_cast<std::size_t>(trained) < needed)
        fmt::print(stderr, "warning: the model was trained on contexts of {} tokens; text beyond that may be poor\n", trained);

    if (o.echo) {
        std::fwrite(prompt.data(), 1, prompt.size(), stdout);
        std::fflush(stdout);  // it is read while the prompt is computed
    }
    const std::int64_t start = llama_time_us();
    const int last = static_cast<int>(tokens.size()) - 1;
    session.feed(tokens, 0, last, last + 1, 0, nullptr, [](int, int, const float*) {});
    const std::int64_t prompt_us = llama_time_us() - start;

    const SamplerPtr sampler = make_sampler(o);
    const std::int64_t generate_start = llama_time_us();
    int n = 0, n_decoded = 0;
    for (; n < o.n_predict; n++) {
        check_logits(session);
        const llama_token token = llama_sampler_sample(sampler.get(), session.context(), -1);
        if (!o.ignore_eos && llama_vocab_is_eog(session.vocab(), token)) break;
        const std::string text = token_text(session.vocab(), token);
        std::fwrite(text.data(), 1, text.size(), stdout);
        std::fflush(stdout);
        if (n + 1 == o.n_predict) continue;  // the last token need not be decoded
        const int pos = static_cast<int>(tokens.size()) + n_decoded++;
        session.decode({&token, 1}, pos, pos, pos + 1);
    }
    const std::int64_t generate_us = llama_time_us() - generate_start;
    std::fputs("\n", stdout);
    std::fflush(stdout);
    fmt::print(stderr, "\nprompt:     {}\ngeneration: {}\n", rate(tokens.size(), prompt_us),
               rate(static_cast<std::size_t>(n), generate_us));
    print_memory(session);
}

}  // namespace

void add_run(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<RunOptions>();
    CLI::App* cmd = app.add_subcommand("run", "Generate text with a compressed KV cache; report speed and cache memory");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    CLI::Option* prompt = cmd->add_option("-p,--prompt", o->prompt, "Prompt");
    CLI::Option* file = cmd->add_option("-f,--file", o->prompt_file, "File with the prompt");
    prompt->excludes(file);
    cmd->add_option("-n,--predict", o->n_predict, "Tokens to generate")->check(CLI::Range(0, 1 << 30))->capture_default_str();
    cmd->add_option("-c,--ctx-size", o->context.n_ctx, "Context (default: prompt and -n, rounded up to 256)")
        ->check(CLI::Range(1, 1 << 30));
    cmd->add_option("-t,--threads", o->context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_option("-b,--batch-size", o->context.n_batch, "Prompt tokens per call")->check(CLI::Range(1, 1 << 20))->capture_default_str();
    cmd->add_option("--ubatch-size", o->context.n_ubatch, "Prompt tokens computed at once (also -ub)")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    cmd->add_option("--kv", o->kv, "KV cache format: see `turboquant formats`, or auto:BITS, auto:SIZE, PLAN.json")->capture_default_str();
    add_window_options(*cmd, o->windows);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("--calib", o->calib_file, "Text on which auto: measures (default: one that ships with turboquant)");
    cmd->add_option("--temp", o->temp, "Temperature; 0: greedy")->check(CLI::Range(0.0, 100.0))->capture_default_str();
    cmd->add_option("--top-k", o->top_k, "Sample from the k most likely; 0: all")->check(CLI::Range(0, 1 << 30))->capture_default_str();
    cmd->add_option("--top-p", o->top_p, "Nucleus; 1: off")->check(CLI::Range(0.0, 1.0))->capture_default_str();
    cmd->add_option("--min-p", o->min_p, "Least share of the top probability; 0: off")->check(CLI::Range(0.0, 1.0))->capture_default_str();
    cmd->add_option("--seed", o->seed, "Random seed")->capture_default_str();
    cmd->add_flag("--ignore-eos", o->ignore_eos, "Go on after an end-of-text token");
    cmd->add_flag("--echo", o->echo, "Print the prompt before the text");
    cmd->callback([o, &global] { run(*o, global); });
}

}  // namespace turboquant::cli
