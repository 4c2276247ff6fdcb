// `turboquant report`: everything that is measured on a model, on one page.
#include <algorithm>
#include <array>
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
#include "turboquant/llama/model_id.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/decode_speed.h"
#include "turboquant/measure/evaluate.h"
#include "turboquant/measure/inspect.h"

namespace turboquant::cli {
namespace {

using namespace llama;
using namespace measure;

using nlohmann::ordered_json;

constexpr std::array<const char*, 4> kParts{"eval", "inspect", "plan", "speed"};

struct ReportOptions {
    EvalOptions eval;
    std::vector<int> depths;  ///< empty: default_depths
    double bits = 4.25;
    bool no_plan = false;
    WeightOptions weights;
    GpuOptions gpu;
    std::string model, output, json, python;
    std::vector<std::string> parts{kParts.begin(), kParts.end()};

    bool has(std::string_view part) const { return std::ranges::find(parts, part) != parts.end(); }
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

/// What the formats cost. Gives the formats and their plans back, for the other parts.
ordered_json evaluation(ModelFile& file, const EvalOptions& e, std::vector<CacheSpec>& specs, std::vector<std::optional<Plan>>& plans) {
    const std::vector<EvalResult> results = evaluate(file, e);
    for (const EvalResult& r : results)
        if (!r.floor) specs.push_back(r.spec), plans.push_back(r.plan);
    return {{"text", std::filesystem::path(e.text_file).filename().string()},
            {"n_ctx", e.context.n_ctx},
            {"tokens", results.empty() ? 0 : results[0].score.tokens},
            {"rows", to_json(results)}};
}

/// Those of the formats; if there are none, one more is made, unless there shall be none.
ordered_json plans_of(ModelFile& file, const ReportOptions& o, const std::vector<CacheSpec>& specs,
                      const std::vector<std::optional<Plan>>& plans) {
    ordered_json out = ordered_json::array();
    const auto add = [&](const std::string& kv, const Plan& plan) {
        out.push_back({{"kv", kv}, {"plan", ordered_json::parse(to_json(plan))}});
    };
    for (std::size_t i = 0; i < specs.size(); i++)
        if (plans[i]) add(specs[i].name, *plans[i]);
    if (!out.empty() || o.no_plan) return out;
    file.use_device();
    Planner planner(file, {.calib_file = o.eval.calib_file, .n_threads = o.eval.context.n_threads});
    add(fmt::format("auto:{:g}", o.bits), planner.plan({o.bits, 0}, 0));
    return out;
}

ordered_json speed(ModelFile& file, const ReportOptions& o, const std::vector<CacheSpec>& specs) {
    const EvalOptions& e = o.eval;
    const std::vector<int> depths = o.depths.empty() ? default_depths(e.context.n_ctx) : o.depths;
    const std::shared_ptr<llama_model> model = file.model();
    const std::vector<llama_token> tokens = tokenize(llama_model_get_vocab(model.get()), read_text_file(e.text_file), false);
    fmt::print(stderr, "decode speed at depths up to {}\n", depths.back());
    return {{"timed_tokens", kTimedTokens}, {"rows", to_json(decode_speed(file, specs, tokens, depths, e.context))}};
}

/// One document, with those of `eval`, `inspect`, `plans` and `speed` that are asked for, as docs/cli.md has them.
ordered_json gather(ReportOptions& o, const GlobalOptions& global) {
    EvalOptions& e = o.eval;
    if (e.context.n_threads == 0) e.context.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    ModelFile file = open_model(o.model, global, o.gpu, o.weights, e.context.n_threads);
    ordered_json document{{"turboquant_report", 1},
                          {"model", identify_model(file.path()).name},
                          {"file", std::filesystem::path(o.model).filename().string()},
                          {"ggml", ggml_version()},
                          {"threads", e.context.n_threads}};
    for (const CodecInfo& c : kCodecs) document["format_bits"][std::string(c.name)] = c.bits;
    std::vector<CacheSpec> specs;
    std::vector<std::optional<Plan>> plans;
    if (o.has("eval") || o.has("plan") || o.has("speed")) {
        if (e.kv.empty()) e.kv = default_formats(file, e.context.n_threads);
        if (o.has("eval"))
            document["eval"] = evaluation(file, e, specs, plans);
        else
            specs = KvArguments(e.kv, e.windows)
                        .resolve(file, e.context.n_ctx, {.calib_file = e.calib_file, .n_threads = e.context.n_threads}, &plans);
    }
    if (o.has("inspect")) document["inspect"] = to_json(inspect(file, {.text_file = e.calib_file, .n_threads = e.context.n_threads}));
    if (o.has("plan")) document["plans"] = plans_of(file, o, specs, plans);
    if (o.has("speed")) document["speed"] = speed(file, o, specs);
    return document;
}

void write_document(const ordered_json& document, const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    out << document.dump(1) << "\n";
    out.close();
    if (!out) throw CommandError(fmt::format("cannot write '{}'; check the path and the disk", path));
}

void report(ReportOptions o, const GlobalOptions& global) {
    if (o.eval.text_file.empty() && (o.has("eval") || o.has("speed"))) throw CLI::RequiredError("--file");
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
    cmd->add_option("-f,--file", o->eval.text_file, "Text to evaluate on; for eval and speed");
    cmd->add_option("-o,--output", o->output, "Page to write (HTML)")->required();
    cmd->add_option("--parts", o->parts, "What is measured: eval, inspect, plan, speed (default: all)")
        ->delimiter(',')
        ->check(CLI::IsMember(kParts));
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
    o->eval.chunks = 1;  // ten formats and two plans of a model of 1.5 billion parameters are minutes then, not an hour
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
