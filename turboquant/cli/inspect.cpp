// `turboquant inspect`: a model's keys and values, and what follows from them.
#include "turboquant/cli/inspect.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <thread>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/model_id.h"
#include "turboquant/cli/planner.h"
#include "turboquant/cli/table.h"
#include "turboquant/cli/text.h"

namespace turboquant::cli {
namespace {

constexpr int kSequence = 1024, kShortest = 16;

/// key_noise at which keys are told apart badly, and hardly at all.
constexpr double kSuffers = 0.3, kFails = 1;

/// The layer where `f` is largest.
const LayerStatistics& worst(const std::vector<LayerStatistics>& layers, const auto& f) { return *std::ranges::max_element(layers, {}, f); }

/// The narrowest uniform keys that do with the constant part left in; nothing if none do.
std::optional<int> bits_needed(const std::vector<LayerStatistics>& layers) {
    for (const CodecId codec : {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4, CodecId::turbo5, CodecId::turbo6, CodecId::turbo8})
        if (std::ranges::all_of(layers, [&](const LayerStatistics& l) { return key_noise(l, codec) < kSuffers; }))
            return codec_info(codec).bits;
    return std::nullopt;
}

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

double key_noise(const LayerStatistics& layer, CodecId codec) {
    return relative_mse(codec, Side::key, 128) / std::max(1 - layer.k_offset_share, 1e-9);
}

std::string verdict(const std::vector<LayerStatistics>& layers, double outlier_ratio) {
    const LayerStatistics& most = worst(layers, &LayerStatistics::k_offset_share);
    const std::optional<int> needed = bits_needed(layers);
    const double noise = key_noise(most, CodecId::turbo4), share = 100 * most.k_offset_share;
    std::string text;
    if (noise >= kSuffers) {
        text = fmt::format(
            "This model's keys carry a bias: {:.4g} % of their energy in layer {} is a constant offset. Uniform 4-bit K will {} (its noise "
            "is {:.3g} times what tells keys apart), it takes {}; with offset removal, which is on by default in the formats of ours, the "
            "constant part costs nothing.",
            share, most.layer, noise >= kFails ? "fail" : "lose much", noise,
            needed ? fmt::format("{} bits", *needed) : "more than 8 bits");
    } else {
        text = fmt::format(
            "Nothing in this model's keys breaks uniform 4-bit K: at most {:.3g} % of their energy (layer {}) is a constant offset. "
            "Uniform K "
            "does from {} bits on; offset removal, on by default, takes that part out anyway.",
            share, most.layer, *needed);
    }
    const LayerStatistics& k = worst(layers, [](const LayerStatistics& l) { return l.k.outlier_share; });
    const auto v_share = [](const LayerStatistics& l) { return l.v ? l.v->outlier_share : 0; };
    const LayerStatistics& v = worst(layers, v_share);
    text += fmt::format(" Outlier channels (RMS above {:g} times the median): {} of K's, {} of V's.", outlier_ratio,
                        k.k.outlier_share > 0 ? fmt::format("up to {:.1f} % (layer {})", 100 * k.k.outlier_share, k.layer) : "none",
                        v_share(v) > 0 ? fmt::format("up to {:.1f} % (layer {})", 100 * v_share(v), v.layer) : "none");
    const LayerStatistics& apart = worst(layers, [](const LayerStatistics& l) { return l.ratio().value_or(0); });
    if (const auto ratio = apart.ratio(); ratio && *ratio > 2)
        text +=
            fmt::format(" Keys are up to {:.3g} times as long as values (layer {}): they need budgets of their own.", *ratio, apart.layer);
    return text;
}

Inspection inspect(ModelFile& file, const std::string& path, InspectOptions o) {
    if (o.n_threads == 0) o.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const ModelFile::Loaded plain = file.load(CacheSpec{"f16", std::nullopt});
    llama_model* model = plain.model.get();
    const llama_vocab* vocab = llama_model_get_vocab(model);
    int length = std::min(kSequence, o.n_tokens);
    if (const int trained = llama_model_n_ctx_train(model); trained > 0) length = std::min(length, trained);
    if (!o.text_file.empty())
        length = std::clamp(static_cast<int>(tokenize(vocab, read_text_file(o.text_file), false).size()), kShortest, length);
    KvProbe probe(model, length, o.n_threads);
    const int n_sequences = std::max(1, o.n_tokens / length);
    const Calibration text = o.text_file.empty() ? generate_text(model, n_sequences, length, 1, o.n_threads)
                                                 : text_from_file(vocab, o.text_file, n_sequences, length);
    Inspection r;
    r.model = identify_model(path).name, r.text = text.source, r.n_tokens = static_cast<int>(text.n_tokens());
    r.outlier_ratio = o.outlier_ratio;
    KvStatistics statistics;
    for (const auto& tokens : text.sequences) probe.run(tokens, [&](const KvRows& rows) { statistics.add(rows); });
    r.layers = statistics.layers(o.outlier_ratio);
    if (r.layers.empty()) throw CommandError("this model writes no keys into a cache that could be looked at");
    double v_norm = 0;
    std::size_t n_v = 0;
    for (const LayerStatistics& l : r.layers) {
        r.k_norm += l.k.norm / static_cast<double>(r.layers.size());
        if (l.v) v_norm += l.v->norm, n_v++;
    }
    if (n_v) r.v_norm = v_norm / static_cast<double>(n_v);
    if (r.v_norm && *r.v_norm > 0) r.ratio = r.k_norm / *r.v_norm;
    r.verdict = verdict(r.layers, o.outlier_ratio);
    if (o.bits > 0) {
        Planner planner(
            file, path,
            {.calib_file = o.text_file, .calib_tokens = o.text_file.empty() ? 0 : std::max(128, r.n_tokens), .n_threads = o.n_threads});
        r.plan = planner.plan({o.bits, 0}, 0);
    }
    return r;
}

nlohmann::ordered_json to_json(const Inspection& r) {
    using json = nlohmann::ordered_json;
    const auto optional = [](const std::optional<double>& x) { return x ? json(*x) : json(nullptr); };
    json layers = json::array();
    for (const LayerStatistics& l : r.layers)
        layers.push_back({{"layer", l.layer},
                          {"k_norm", l.k.norm},
                          {"v_norm", l.v ? json(l.v->norm) : json(nullptr)},
                          {"ratio", optional(l.ratio())},
                          {"k_max_rms", l.k.max_rms},
                          {"k_median_rms", l.k.median_rms},
                          {"k_outlier_share", l.k.outlier_share},
                          {"v_outlier_share", l.v ? json(l.v->outlier_share) : json(nullptr)},
                          {"k_offset_share", l.k_offset_share},
                          {"k_norm_heads", l.k.norm_heads},
                          {"v_norm_heads", l.v ? json(l.v->norm_heads) : json(nullptr)}});
    return {{"model", r.model},           {"text", r.text},
            {"tokens", r.n_tokens},       {"outlier_ratio", r.outlier_ratio},
            {"k_norm", r.k_norm},         {"v_norm", optional(r.v_norm)},
            {"ratio", optional(r.ratio)}, {"layers", layers},
            {"verdict", r.verdict},       {"plan", r.plan ? json::parse(to_json(*r.plan)) : json(nullptr)}};
}

void add_inspect(CLI::App& app, const GlobalOptions& global) {
    struct Options {
        std::string model;
        InspectOptions inspect;
        bool no_plan = false, json = false;
    };
    auto o = std::make_shared<Options>();
    CLI::App* cmd = app.add_subcommand("inspect", "Norms, outlier channels and the constant part of a model's keys and values");
    cmd->add_option("-m,--model", o->model, "Model file (GGUF)")->required();
    cmd->add_option("-f,--file", o->inspect.text_file, "Text to run through the model (default: the model writes one)");
    cmd->add_option("-n,--tokens", o->inspect.n_tokens, "Tokens of it, at most")
        ->check(CLI::Range(kShortest, 1 << 24))
        ->capture_default_str();
    cmd->add_option("--outlier-ratio", o->inspect.outlier_ratio, "A channel is an outlier above so many times its head's median RMS")
        ->check(CLI::Range(1.0, 1e6))
        ->capture_default_str();
    cmd->add_option("--bits", o->inspect.bits, "Budget of the plan to show")->check(CLI::Range(1.0, 32.0))->capture_default_str();
    cmd->add_flag("--no-plan", o->no_plan, "Show no plan: it takes most of the time");
    cmd->add_option("-t,--threads", o->inspect.n_threads, "Threads (default: all)")->check(CLI::Range(1, 4096));
    cmd->add_flag("--json", o->json, "Print a JSON object instead of tables");
    cmd->callback([o, &global] {
        if (o->no_plan) o->inspect.bits = 0;
        ModelFile file(o->model, global);
        const Inspection r = inspect(file, o->model, o->inspect);
        if (o->json) return fmt::print("{}\n", to_json(r).dump(2));
        fmt::print("{}: {} tokens, text {}\n\n{}\n{}\n", r.model, r.n_tokens, r.text, to_table(r), r.verdict);
        if (r.plan)
            fmt::print("\nPlan for {:g} bits ({:.3f} used, predicted mean KLD {:.5f}): --kv {}\n", r.plan->budget, r.plan->bits_per_value,
                       *r.plan->predicted_kld, brief_text(to_spec(*r.plan)));
    });
}

}  // namespace turboquant::cli
