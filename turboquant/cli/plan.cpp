// `turboquant plan`: the best formats for a model within a budget, found by measurement.
#include "turboquant/planner/plan.h"

#include <cstdio>
#include <memory>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/measure/planner.h"

namespace turboquant::cli {
namespace {

using namespace measure;

struct PlanCommand {
    std::string model, memory, output, from, options;
    double bits = 0;
    int n_ctx = 0;
    bool measure = false, no_race = false;
    WeightOptions weights{.f16 = true};
    GpuOptions gpu;
    PlannerOptions planner;
};

std::string to_table(const Plan& plan) {
    std::vector<std::vector<std::string>> rows{
        {"layer", "keys", "predicted KLD", "values", "predicted KLD", "measured (keys)", "(values)"}};
    const auto measured = [&](int layer, Side side) {
        std::string text;
        for (const MeasuredSlot& s : plan.measurements->slots)
            if (s.layer == layer && s.side == side) text += (text.empty() ? "" : "/") + fmt::format("{:.5f}+-{:.5f}", s.kld, s.error);
        return text.empty() ? "-" : text;
    };
    for (const PlannedLayer& l : plan.layers)
        rows.push_back({std::to_string(l.layer), to_string(l.k), fmt::format("{:.6f}", l.k_kld), l.v ? to_string(*l.v) : "-",
                        l.v ? fmt::format("{:.6f}", l.v_kld) : "-", measured(l.layer, Side::key), measured(l.layer, Side::value)});
    return format_table(rows);
}

std::string race_table(const Plan& plan) {
    std::vector<std::vector<std::string>> rows{{"race on text that was not measured on", "mean KLD", "behind", "+-"}};
    constexpr std::size_t kShown = 60;
    for (const RaceRow& r : plan.race)
        rows.push_back({r.formats.size() > kShown ? r.formats.substr(0, kShown) + "..." : r.formats, fmt::format("{:.6f}", r.kld),
                        fmt::format("{:.6f}", r.behind), fmt::format("{:.6f}", r.error)});
    return format_table(rows);
}

void show(const Plan& plan) {
    const Measurements& m = *plan.measurements;
    fmt::print("{}\n", to_table(plan));
    fmt::print("measured in {} (keys) and {} (values) on {} tokens, {}\n", codec_info(m.k_format).name, codec_info(m.v_format).name,
               m.tokens, m.text);
    if (!m.key_scales.empty())
        fmt::print("key channels scaled: takes {:.1f} % off the divergence that the keys cause\n", 100 * (1 - m.scale_gain));
    if (!plan.race.empty()) fmt::print("\n{}", race_table(plan));
    fmt::print("\n{:.3f} bits per value of {:.3f}; mean KLD predicted {:.6f}{}\n--kv {}\n", plan.bits_per_value, plan.budget,
               *plan.predicted_kld, plan.measured_kld ? fmt::format(", measured on the calibration text {:.6f}", *plan.measured_kld) : "",
               brief_text(to_spec(plan)));
}

Plan make_plan(const PlanCommand& o, const Budget& budget, const GlobalOptions& global) {
    if (!o.from.empty()) {
        const Plan old = read_plan_file(o.from);
        const llama::ModelId id = llama::identify_model(o.model);
        check_model(old, id.hash, id.name);
        return replan(old, budget, o.n_ctx);
    }
    llama::ModelFile file = open_model(o.model, global, o.gpu, o.weights, o.planner.n_threads);
    Planner planner(file, o.planner);
    Plan plan = planner.plan(budget, o.n_ctx);
    if (o.measure) plan.measured_kld = planner.measure(plan).mean;
    return plan;
}

void run(PlanCommand o, const GlobalOptions& global) {
    o.planner.spec = parse_spec_options(o.options);
    o.planner.race = !o.no_race;
    const Budget budget = o.memory.empty() ? Budget{o.bits, 0} : parse_budget(o.memory);
    if (budget.bits > 0 && !o.memory.empty()) throw CommandError(fmt::format("--memory {}: give a unit, like 512MiB", o.memory));
    const Plan plan = make_plan(o, budget, global);
    if (!o.output.empty()) write_plan_file(plan, o.output);
    show(plan);
    if (!o.output.empty()) fmt::print("written to {}; use it as --kv {}\n", o.output, o.output);
}

}  // namespace

void add_plan(CLI::App& app, const GlobalOptions& global) {
    auto o = std::make_shared<PlanCommand>();
    CLI::App* cmd = app.add_subcommand("plan", "Choose the formats of all layers for a budget, by measuring this model");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--calib,--file", o->planner.calib_file,
                    "Text to calibrate on (default: one of several kinds that ships with turboquant)");
    CLI::Option* bits = cmd->add_option("--bits", o->bits, "Budget: bits per value, everything counted")->check(CLI::Range(1.0, 32.0));
    CLI::Option* memory = cmd->add_option("--memory", o->memory, "Budget: memory of the whole cache at --ctx tokens, like 512MiB");
    auto* group = cmd->add_option_group("budget", "One budget");
    group->add_options(bits, memory);
    group->require_option(1);
    cmd->add_option("-c,--ctx,--ctx-size", o->n_ctx, "Context for which memory is counted (default: the one the model was trained on)")
        ->check(CLI::Range(1, 1 << 30));
    cmd->add_option("-o,--output", o->output, "Plan file to write (JSON)");
    cmd->add_option("--from", o->from, "Plan file whose measurements serve for another budget: nothing is measured");
    cmd->add_flag("--measure", o->measure, "Measure the plan's divergence on the calibration text");
    cmd->add_flag("--no-race", o->no_race, "Do not hold the plan against the best uniform formats");
    cmd->add_option("--options", o->options, "OPTIONs of the SPEC for all layers, like offset=off");
    cmd->add_option("--calib-tokens", o->planner.calib_tokens, "Tokens to calibrate on (default: minutes' worth)")
        ->check(CLI::Range(128, 1 << 20));
    cmd->add_flag("--per-head", o->planner.per_head, "A format per KV head, however long it takes to measure (default: if it is quick)");
    cmd->add_option("--seed", o->planner.seed, "Calibrate on text that the model writes, from this seed")->check(CLI::Range(1u, ~0u));
    add_weight_options(*cmd, o->weights);
    add_gpu_options(*cmd, o->gpu);
    cmd->add_option("-t,--threads", o->planner.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->callback([o, &global] { run(*o, global); });
}

}  // namespace turboquant::cli
