// `turboquant eval`: what a cache format costs in perplexity and KL divergence.
#include <cstdio>
#include <map>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/command.h"
#include "turboquant/cli/documents.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"
#include "turboquant/measure/evaluate.h"

namespace turboquant::cli {
namespace {

using namespace measure;

struct EvalCommand {
    std::string model;
    WeightOptions weights;
    GpuOptions gpu;
    EvalOptions eval;
    bool json = false;
};

std::string to_table(const std::vector<EvalResult>& results) {
    std::vector<std::vector<std::string>> rows{{"kv", "bits/value", "KV MiB", "PPL", "PPL f16", "mean KLD", "+-", "median", "99%", "99.9%",
                                                "1-TV %", "same top %", "beside the best other of no more bits"}};
    for (const EvalResult& r : results)
        rows.push_back(
            {r.floor ? r.spec.name + " (floor)" : r.spec.name, fmt::format("{:.3f}", r.memory.bits_per_value),
             fmt::format("{:.2f}", r.memory.bytes / (1 << 20)), fmt::format("{:.4f}", r.score.ppl), fmt::format("{:.4f}", r.score.ppl_ref),
             fmt::format("{:.6f}", r.score.mean_kld), fmt::format("{:.6f}", r.score.mean_kld_error),
             fmt::format("{:.6f}", r.score.median_kld), fmt::format("{:.6f}", r.score.kld_99), fmt::format("{:.6f}", r.score.kld_999),
             fmt::format("{:.2f}", 100 * r.score.overlap), fmt::format("{:.2f}", 100 * r.score.same_top),
             r.best_other
                 ? fmt::format("{:+.6f} +- {:.6f} {}", r.best_other->difference.mean, r.best_other->difference.error, r.best_other->other)
                 : "-"});
    return format_table(rows);
}

}  // namespace

void add_eval(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<EvalCommand>();
    CLI::App* cmd = app.add_subcommand("eval", "Perplexity and KL divergence of KV cache formats against llama.cpp's own f16 cache");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->eval.text_file, "Text to evaluate on")->required();
    cmd->add_option("--kv", o->eval.kv, "KV cache formats, any number: see `turboquant formats`, or auto:BITS, auto:SIZE, PLAN.json")
        ->required();
    add_window_options(*cmd, o->eval.windows);
    cmd->add_option("--calib", o->eval.calib_file, "Text on which auto: measures (default: one that ships with turboquant)");
    cmd->add_option("-c,--ctx-size", o->eval.context.n_ctx, "Tokens per chunk; the second half of each is scored")
        ->check(CLI::Range(8, 1 << 30))
        ->capture_default_str();
    cmd->add_option("--chunks", o->eval.chunks, "Chunks of the text, at most")->check(CLI::Range(1, 1 << 30))->capture_default_str();
    cmd->add_option("--mode", o->eval.mode,
                    "batch: many tokens per call; decode: one token per call (the f16 reference stays in batch mode)")
        ->transform(CLI::CheckedTransformer(std::map<std::string, EvalMode>{{"batch", EvalMode::batch}, {"decode", EvalMode::decode}}));
    add_weight_options(*cmd, o->weights);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->eval.context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_option("-b,--batch-size", o->eval.context.n_batch, "Tokens per call")->check(CLI::Range(1, 1 << 20))->capture_default_str();
    cmd->add_option("--ubatch-size", o->eval.context.n_ubatch, "Tokens computed at once (also -ub)")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    cmd->add_flag("--json", o->json, "Print a JSON array instead of a table");
    cmd->callback([o, &global] {
        llama::ModelFile file = open_model(o->model, global, o->gpu, o->weights, o->eval.context.n_threads);
        const std::vector<EvalResult> results = evaluate(file, o->eval);
        fmt::print("{}", o->json ? to_json(results).dump(2) + "\n" : to_table(results));
    });
}

}  // namespace turboquant::cli
