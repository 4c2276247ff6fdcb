// `turboquant needle`: does a model with a compressed cache still find what stands once in a long text?
#include "turboquant/measure/needle.h"

#include <cstdio>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/command.h"
#include "turboquant/cli/documents.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"

namespace turboquant::cli {
namespace {

using namespace measure;

struct NeedleCommand {
    std::string model;
    WeightOptions weights;
    GpuOptions gpu;
    NeedleOptions needle;
    bool json = false;
};

/// Found of all per context, then per depth. Results come format by format, all contexts of each.
std::string to_table(const std::vector<NeedleResult>& results, std::size_t n_ctx) {
    std::vector<std::vector<std::string>> all{{"kv"}}, grid{{"kv", "ctx"}};
    for (std::size_t c = 0; c < n_ctx; c++) all[0].push_back(fmt::format("ctx {}", results[c].ctx));
    for (std::size_t i = 0; i < results[0].found.size(); i++)
        grid[0].push_back(fmt::format("{:.0f} %", depth_percent(i, results[0].found.size())));
    for (std::size_t r = 0; r < results.size(); r++) {
        const NeedleResult& result = results[r];
        if (r % n_ctx == 0) all.push_back({result.kv});
        all.back().push_back(fmt::format("{}/{}", result.sum(), result.total()));
        grid.push_back({result.kv, fmt::format("{}", result.ctx)});
        for (const int n : result.found) grid.back().push_back(fmt::format("{}", n));
    }
    return format_table(all) + fmt::format("\nfound of {} at each depth\n", results[0].per_depth) + format_table(grid);
}

}  // namespace

void add_needle(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<NeedleCommand>();
    CLI::App* cmd = app.add_subcommand("needle", "Numbers hidden in a long text: how many a model with a compressed cache finds again");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->needle.text_file, "Text to hide them in; repeated if it is too short")->required();
    cmd->add_option("--kv", o->needle.kv, "KV cache formats, any number: see `turboquant formats`, or auto:BITS, auto:SIZE, PLAN.json")
        ->required();
    add_window_options(*cmd, o->needle.windows);
    cmd->add_option("--ctx", o->needle.ctx, "Contexts: tokens of text, needles, question and answer together")
        ->delimiter(',')
        ->check(CLI::Range(1, 1 << 30))
        ->capture_default_str();
    cmd->add_option("--depths", o->needle.depths, "Depths, evenly spread from the text's start to its end")
        ->check(CLI::Range(1, 500))
        ->capture_default_str();
    cmd->add_option("--needles", o->needle.needles, "Questions per depth; also needles in each text, every one a distractor to the others")
        ->check(CLI::Range(1, 10000))
        ->capture_default_str();
    cmd->add_option("--template", o->needle.template_file, "Other wording (JSON: needle, question, answer_digits, words, prefix)");
    cmd->add_option("--seed", o->needle.seed, "Of words, numbers and the text's beginning")->capture_default_str();
    cmd->add_option("--calib", o->needle.calib_file, "Text on which auto: measures (default: one that ships with turboquant)");
    add_weight_options(*cmd, o->weights);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->needle.context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_option("-b,--batch-size", o->needle.context.n_batch, "Tokens per call")->check(CLI::Range(1, 1 << 20))->capture_default_str();
    cmd->add_option("--ubatch-size", o->needle.context.n_ubatch, "Tokens computed at once (also -ub)")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    cmd->add_flag("--json", o->json, "Print a JSON array instead of tables");
    cmd->callback([o, &global] {
        llama::ModelFile file = open_model(o->model, global, o->gpu, o->weights, o->needle.context.n_threads);
        const std::vector<NeedleResult> results = search_needles(file, o->needle);
        fmt::print("{}", o->json ? to_json(results).dump(2) + "\n" : to_table(results, o->needle.ctx.size()));
    });
}

}  // namespace turboquant::cli
