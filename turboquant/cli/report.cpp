// `turboquant report`: everything that is measured on a model, on one page.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <thread>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "ggml.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/command.h"
#include "turboquant/cli/documents.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/report_page.h"
#include "turboquant/llama/kv_probe.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/decode_speed.h"
#include "turboquant/measure/evaluate.h"
#include "turboquant/measure/inspect.h"

namespace turboquant::cli {
namespace {

using namespace llama;
using namespace measure;

using nlohmann::ordered_json;

struct ReportOptions {
    EvalOptions eval;
    std::vector<int> depths;  ///< empty: default_depths
    double bits = 4.25;
    bool no_plan = false;
    WeightOptions weights;
    GpuOptions gpu;
    std::string model, output, json, python;
};

/// Without --kv. Types of llama.cpp's whose blocks do not fit into this model's heads are left out: llama.cpp would refuse them.
std::vector<std::string> default_formats(ModelFile& file, int n_threads) {
    std::vector<std::string> out;
    const std::vector<KvLayerShape> layers = KvProbe(file, 256, n_threads).layers();
    for (const char* word : {"f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2", "tcq3", "auto:4.25", "auto:3.25"}) {
        const std::optional<ggml_type> type = find_llama_type(word);
        const auto fits = [&](const KvLayerShape& s) {
            return s.k_head_dim % ggml_blck_size(*type) == 0 && s.v_head_dim % ggml_blck_size(*type) == 0;
        };
        if (!type || std::ranges::all_of(layers, fits))
            out.emplace_back(word);
        else
            fmt::print(stderr, "{} is left out: its blocks do not fit into this model's heads\n", word);
    }
    return out;
}

const char* family(const EvalResult& r) {
    if (r.floor) return "floor";
    if (!r.spec.ours) return "llama.cpp";
    return r.plan ? "planned" : "turboquant";
}

/// One document: `inspect`, `plans`, `eval` and `speed` as docs/cli.md has them.
ordered_json gather(ReportOptions& o, const GlobalOptions& global) {
    EvalOptions& e = o.eval;
    if (e.context.n_threads == 0) e.context.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    ModelFile file = open_model(o.model, global, o.gpu, o.weights, e.context.n_threads);
    if (e.kv.empty()) e.kv = default_formats(file, e.context.n_threads);
    const std::vector<EvalResult> results = evaluate(file, e);
    ordered_json rows = to_json(results), plans = ordered_json::array();
    std::vector<CacheSpec> specs;
    for (std::size_t i = 0; i < results.size(); i++) {
        const EvalResult& r = results[i];
        if (!r.floor) specs.push_back(r.spec);
        rows[i]["family"] = family(r);
        if (r.plan) plans.push_back({{"kv", r.spec.name}, {"plan", ordered_json::parse(to_json(*r.plan))}});
    }
    // A plan beside the formats is shown; one more is made only if there is none.
    InspectOptions inspect_options{.text_file = e.calib_file, .bits = plans.empty() && !o.no_plan ? o.bits : 0};
    inspect_options.n_threads = e.context.n_threads;
    const Inspection inspection = inspect(file, inspect_options);
    if (inspection.plan)
        plans.push_back(
            {{"kv", fmt::format("auto:{:g}", inspection.plan->budget)}, {"plan", ordered_json::parse(to_json(*inspection.plan))}});
    ordered_json format_bits;
    for (const CodecInfo& c : kCodecs) format_bits[std::string(c.name)] = c.bits;

    const std::vector<int> depths = o.depths.empty() ? default_depths(e.context.n_ctx) : o.depths;
    const std::shared_ptr<llama_model> model = file.model();
    const std::vector<llama_token> tokens = tokenize(llama_model_get_vocab(model.get()), read_text_file(e.text_file), false);
    fmt::print(stderr, "decode speed at depths up to {}\n", depths.back());
    const std::vector<DecodeSpeed> speeds = decode_speed(file, specs, tokens, depths, e.context);
    return {{"turboquant_report", 1},
            {"model", inspection.model},
            {"file", std::filesystem::path(o.model).filename().string()},
            {"ggml", ggml_version()},
            {"threads", e.context.n_threads},
            {"format_bits", format_bits},
            {"inspect", to_json(inspection)},
            {"plans", plans},
            {"eval",
             {{"text", std::filesystem::path(e.text_file).filename().string()},
              {"n_ctx", e.context.n_ctx},
              {"tokens", results.empty() ? 0 : results[0].score.tokens},
              {"rows", rows}}},
            {"speed", {{"timed_tokens", kTimedTokens}, {"rows", to_json(speeds)}}}};
}

void write_document(const ordered_json& document, const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    out << document.dump(1) << "\n";
    out.close();
    if (!out) throw CommandError(fmt::format("cannot write '{}'; check the path and the disk", path));
}

void report(ReportOptions o, const GlobalOptions& global) {
    const KvArguments arguments(o.eval.kv, o.eval.windows);  // what is wrong about the words is told before minutes are spent
    if (!o.depths.empty()) {
        std::ranges::sort(o.depths);
        o.depths.erase(std::unique(o.depths.begin(), o.depths.end()), o.depths.end());
    }
    const std::string python = find_python(o.python);
    const std::string kept = o.json.empty() ? o.output + ".json" : o.json;
    if (const std::string problem = python_problem(python); !problem.empty())
        fmt::print(stderr, "warning: no page can be drawn afterwards, only the numbers will be kept, in {}: {}\n", kept, problem);
    write_document(gather(o, global), kept);
    try {
        draw_page(python, kept, o.output);
    } catch (const std::runtime_error& e) {
        throw CommandError(fmt::format("{}\nThe numbers are in {}; report.py {} -o {} draws them without measuring again", e.what(), kept,
                                       kept, o.output));
    }
    if (o.json.empty()) std::filesystem::remove(kept);
    fmt::print("written to {}\n", o.output);
}

}  // namespace

void add_report(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<ReportOptions>();
    CLI::App* cmd = app.add_subcommand("report", "Everything that is measured on a model, as one HTML page");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->eval.text_file, "Text to evaluate on")->required();
    cmd->add_option("-o,--output", o->output, "Page to write (HTML)")->required();
    cmd->add_option("--json", o->json, "Write the numbers to this file, too");
    cmd->add_option("--kv", o->eval.kv,
                    "KV cache formats, as for eval (default: f16 q8_0 q5_0 q4_0 turbo4 turbo3 turbo2 tcq3 auto:4.25 auto:3.25)");
    add_window_options(*cmd, o->eval.windows);
    cmd->add_option("--calib", o->eval.calib_file, "Text for the statistics and for auto: (default: one that ships with turboquant)");
    cmd->add_option("--bits", o->bits, "Budget of the plan to show if --kv has none")->check(CLI::Range(1.0, 32.0))->capture_default_str();
    cmd->add_flag("--no-plan", o->no_plan, "Make no plan for that");
    cmd->add_option("-c,--ctx-size", o->eval.context.n_ctx, "Tokens per chunk; the default depths end there, too")
        ->check(CLI::Range(64, 1 << 30))
        ->capture_default_str();
    cmd->add_option("--chunks", o->eval.chunks, "Chunks of the text, at most")->check(CLI::Range(1, 1 << 30))->capture_default_str();
    cmd->add_option("--depths", o->depths, "Tokens in the cache at which decoding is timed (default: 0, a quarter, half and all of -c)")
        ->delimiter(',')
        ->check(CLI::Range(0, 1 << 24));
    add_weight_options(*cmd, o->weights);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->eval.context.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_option("--python", o->python, "Python with matplotlib (default: the project's .venv, else python3)");
    cmd->callback([o, &global] { report(*o, global); });
}

}  // namespace turboquant::cli
