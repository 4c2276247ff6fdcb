// `turboquant bench decode`: tokens/s of a model against depth, caches taking turns.
#include <algorithm>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/command.h"
#include "turboquant/cli/documents.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"
#include "turboquant/llama/calibration.h"
#include "turboquant/llama/calibration_text.h"
#include "turboquant/measure/decode_speed.h"
#include "turboquant/measure/kv_resolve.h"

namespace turboquant::cli {
namespace {

using namespace measure;

struct DecodeOptions {
    std::string model;
    std::vector<std::string> kv{"f16", "q8_0", "q4_0", "turbo4", "tcq3"};
    std::vector<int> depths{0, 4096};
    WindowSizes windows;
    GpuOptions gpu;
    llama::ContextOptions context;
    bool json = false;
};

/// A row per format, a column per depth; beside each the ratio to the first row's.
std::string to_table(const std::vector<DecodeSpeed>& speeds, const std::vector<int>& depths) {
    std::vector<std::vector<std::string>> rows{{"tokens/s"}};
    for (const int d : depths) rows[0].push_back(std::to_string(d));
    const std::size_t n = speeds.size() / depths.size();
    for (std::size_t s = 0; s < n; s++) {
        rows.push_back({speeds[s].kv});
        for (std::size_t d = 0; d < depths.size(); d++)
            rows.back().push_back(fmt::format("{:.1f} ({:.2f})", 1e3 / speeds[d * n + s].ms, speeds[d * n].ms / speeds[d * n + s].ms));
    }
    return format_table(rows);
}

void bench(DecodeOptions o, const GlobalOptions& global) {
    std::ranges::sort(o.depths);
    o.depths.erase(std::unique(o.depths.begin(), o.depths.end()), o.depths.end());
    const KvArguments arguments(o.kv, o.windows);
    llama::ModelFile file = open_model(o.model, global, o.gpu, {}, o.context.n_threads);
    const std::vector<llama::CacheSpec> specs = arguments.resolve(file, o.depths.back(), {.n_threads = o.context.n_threads});
    const llama::Calibration text = llama::text_of_parts(llama_model_get_vocab(file.model().get()), llama::calibration_parts(), 1, 512);
    const std::vector<DecodeSpeed> speeds = decode_speed(file, specs, text.sequences[0], o.depths, o.context);
    fmt::print(stderr, "{}: weights and cache on {}; {} tokens timed at each depth\n", o.model, file.place(), kTimedTokens);
    fmt::print("{}", o.json ? to_json(speeds).dump(2) + "\n" : to_table(speeds, o.depths));
}

}  // namespace

void add_bench_decode(CLI::App& bench_command, const GlobalOptions& global) {
    auto o = std::make_shared<DecodeOptions>();
    CLI::App* cmd = bench_command.add_subcommand("decode", "Tokens/s of a whole model, token by token, against depth");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("--kv", o->kv, "KV cache formats; ratios are to the first")->capture_default_str();
    cmd->add_option("--depths", o->depths, "Tokens in the cache, e.g. 0,4096")
        ->delimiter(',')
        ->check(CLI::Range(0, 1 << 24))
        ->capture_default_str();
    add_window_options(*cmd, o->windows);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_flag("--json", o->json, "Print a JSON array instead of a table");
    cmd->callback([o, &global] { bench(*o, global); });
}

}  // namespace turboquant::cli
