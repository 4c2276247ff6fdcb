// `turboquant plan`: the best formats for a model within a budget, found by measurement.
#include "turboquant/planner/plan.h"

#include <cstdio>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"
#include "turboquant/measure/planner.h"

namespace turboquant::cli {
namespace {

using namespace measure;

struct PlanOptions {
    std::string model, memory, output;
    double bits = 0;
    int n_ctx = 0;
    bool measure = false;
    std::string options;
    PlannerOptions planner;
};

std::string to_table(const Planner& planner, const Plan& plan) {
    std::vector<std::vector<std::string>> rows{
        {"layer", "keys", "predicted KLD", "values", "predicted KLD", "measured (keys)", "", "(values)", ""}};
    const auto points = [&](int layer, Side side, std::size_t i) {
        std::string text;
        for (const Slot& s : planner.slots()) {
            if (s.layer != layer || s.side != side) continue;
            const std::string point = i < s.points.size() ? fmt::format("{:.5f}+-{:.5f}", s.points[i].kld, s.errors[i]) : "-";
            if (text != point) text += (text.empty() ? "" : "/") + point;
        }
        return text.empty() ? "-" : text;
    };
    for (const PlannedLayer& l : plan.layers)
        rows.push_back({std::to_string(l.layer), to_string(l.k), fmt::format("{:.6f}", l.k_kld), l.v ? to_string(*l.v) : "-",
                        l.v ? fmt::format("{:.6f}", l.v_kld) : "-", points(l.layer, Side::key, 0), points(l.layer, Side::key, 1),
                        points(l.layer, Side::value, 0), points(l.layer, Side::value, 1)});
    return format_table(rows);
}

void make_plan(const PlanOptions& o, const GlobalOptions& global) {
    const Budget budget = o.memory.empty() ? Budget{o.bits, 0} : parse_budget(o.memory);
    if (budget.bits > 0 && !o.memory.empty()) throw CommandError(fmt::format("--memory {}: give a unit, like 512MiB", o.memory));
    llama::ModelFile file = open_model(o.model, global);
    Planner planner(file, o.planner);
    Plan plan = planner.plan(budget, o.n_ctx);
    if (o.measure) plan.measured_kld = planner.measure(plan).mean;
    if (!o.output.empty()) write_plan_file(plan, o.output);
    fmt::print("{}\n", to_table(planner, plan));
    fmt::print("{:.3f} bits per value of {:.3f}; mean KLD predicted {:.6f}{}\n--kv {}\n", plan.bits_per_value, plan.budget,
               *plan.predicted_kld, plan.measured_kld ? fmt::format(", measured on the calibration text {:.6f}", *plan.measured_kld) : "",
               brief_text(to_spec(plan)));
    if (const auto& scales = planner.key_scales(); !scales.empty())
        fmt::print("key channels scaled: takes {:.1f} % off the divergence that turbo2, 3 and 4 keys cause\n",
                   100 * (1 - planner.scale_gain()));
    if (!o.output.empty()) fmt::print("written to {}; use it as --kv {}\n", o.output, o.output);
}

}  // namespace

void add_plan(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<PlanOptions>();
    CLI::App* cmd = app.add_subcommand("plan", "Choose the formats of all layers for a budget, by measuring this model");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--calib,--file", o->planner.calib_file, "Text to calibrate on (default: the model writes one)");
    CLI::Option* bits = cmd->add_option("--bits", o->bits, "Budget: bits per value, everything counted")->check(CLI::Range(1.0, 32.0));
    CLI::Option* memory = cmd->add_option("--memory", o->memory, "Budget: memory of the whole cache at --ctx tokens, like 512MiB");
    auto* group = cmd->add_option_group("budget", "One budget");
    group->add_options(bits, memory);
    group->require_option(1);
    cmd->add_option("-c,--ctx,--ctx-size", o->n_ctx, "Context for which memory is counted (default: the one the model was trained on)")
        ->check(CLI::Range(1, 1 << 30));
    cmd->add_option("-o,--output", o->output, "Plan file to write (JSON)");
    cmd->add_flag("--measure", o->measure, "Measure the plan's divergence on the calibration text");
    cmd->add_option("--options", o->options, "Further items of the SPEC for all layers, like offset=off");
    cmd->add_option("--calib-tokens", o->planner.calib_tokens, "Tokens to calibrate on (default: about a minute's worth)")
        ->check(CLI::Range(128, 1 << 20));
    cmd->add_flag("--per-head", o->planner.per_head, "A format per KV head, however long it takes to measure (default: if it is quick)");
    cmd->add_option("--seed", o->planner.seed, "Seed of the text that the model writes")->capture_default_str();
    cmd->add_option("-t,--threads", o->planner.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->callback([o, &global] {
        o->planner.spec = parse_spec_options(o->options);
        make_plan(*o, global);
    });
}

}  // namespace turboquant::cli
