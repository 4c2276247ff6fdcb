// `turboquant inspect`: a model's keys and values, and what follows from them.
#include "turboquant/measure/inspect.h"

#include <algorithm>
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

std::string to_table(const Inspection& r) {
    std::vector<std::vector<std::string>> rows{
        {"layer", "K norm", "per head", "V norm", "per head", "K/V", "K RMS max", "median", "K outliers", "V outliers", "K offset"}};
    const auto heads = [](const SideStatistics& s) {
        const auto [least, most] = std::ranges::minmax_element(s.norm_heads);
        return fmt::format("{:.4g}..{:.4g}", *least, *most);
    };
    const auto percent = [](double x) { return fmt::format("{:.1f} %", 100 * x); };
    for (const LayerStatistics& l : r.layers)
        rows.push_back({std::to_string(l.layer), fmt::format("{:.4g}", l.k.norm), heads(l.k), l.v ? fmt::format("{:.4g}", l.v->norm) : "-",
                        l.v ? heads(*l.v) : "-", l.ratio() ? fmt::format("{:.2f}", *l.ratio()) : "-", fmt::format("{:.4g}", l.k.max_rms),
                        fmt::format("{:.4g}", l.k.median_rms), percent(l.k.outlier_share), l.v ? percent(l.v->outlier_share) : "-",
                        percent(l.k_offset_share)});
    rows.push_back({"all", fmt::format("{:.4g}", r.k_norm), "", r.v_norm ? fmt::format("{:.4g}", *r.v_norm) : "-", "",
                    r.ratio ? fmt::format("{:.2f}", *r.ratio) : "-", "", "", "", "", ""});
    return format_table(rows);
}

}  // namespace

void add_inspect(CLI::App& app, const GlobalOptions& global) {
    struct Options {
        std::string model;
        WeightOptions weights;
        GpuOptions gpu;
        InspectOptions inspect;
        bool json = false;
    };
    auto o = std::make_shared<Options>();
    CLI::App* cmd = app.add_subcommand("inspect", "Norms, outlier channels and the constant part of a model's keys and values");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->inspect.text_file, "Text to run through the model (default: one that ships with turboquant)");
    cmd->add_option("-n,--tokens", o->inspect.n_tokens, "Tokens of it, at most")
        ->check(CLI::Range(kShortestInspected, 1 << 24))
        ->capture_default_str();
    cmd->add_option("--outlier-ratio", o->inspect.outlier_ratio, "A channel is an outlier above so many times its head's median RMS")
        ->check(CLI::Range(1.0, 1e6))
        ->capture_default_str();
    cmd->add_option("--bits", o->inspect.bits, "Make a plan for that budget, too, and show it (takes minutes)")
        ->check(CLI::Range(1.0, 32.0));
    add_weight_options(*cmd, o->weights);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->inspect.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_flag("--json", o->json, "Print a JSON object instead of tables");
    cmd->callback([o, &global] {
        llama::ModelFile file = open_model(o->model, global, o->gpu, o->weights, o->inspect.n_threads);
        const Inspection r = inspect(file, o->inspect);
        if (o->json) return fmt::print("{}\n", to_json(r).dump(2));
        fmt::print("{}: {} tokens, text {}\n\n{}\n{}\n", r.model, r.n_tokens, r.text, to_table(r), r.verdict);
        if (r.plan)
            fmt::print("\nPlan for {:g} bits ({:.3f} used, predicted mean KLD {:.5f}): --kv {}\n", r.plan->budget, r.plan->bits_per_value,
                       *r.plan->predicted_kld, brief_text(to_spec(*r.plan)));
    });
}

}  // namespace turboquant::cli
