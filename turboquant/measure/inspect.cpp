#include "turboquant/measure/inspect.h"

#include <algorithm>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/calibration_text.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/model_id.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/planner.h"

namespace turboquant::measure {
namespace {

constexpr int kPiece = 256;  // of a file: several spread over it tell more than its beginning
constexpr int kShortestOfParts = 64;

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

/// Sequences of at most `longest` tokens. Without a file never what the model writes: that may be caught in a loop, and says little then of its
/// keys on any other text (docs/planner.md).
llama::Calibration choose_text(const llama_vocab* vocab, const InspectOptions& o, int longest) {
    if (o.text_file.empty()) {
        llama::Calibration text =
            llama::text_of_parts(vocab, llama::calibration_parts(), o.n_tokens / longest, std::max(longest, kShortestOfParts));
        for (auto& tokens : text.sequences) tokens.resize(std::min(tokens.size(), static_cast<std::size_t>(longest)));
        return text;
    }
    const auto there = static_cast<int>(llama::tokenize(vocab, llama::read_text_file(o.text_file), false).size());
    const int length = std::clamp(there, kShortestInspected, std::min(kPiece, longest));
    return llama::text_from_file(vocab, o.text_file, std::max(1, o.n_tokens / length), length);
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

Inspection inspect(llama::ModelFile& file, InspectOptions o) {
    if (o.n_threads == 0) o.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    if (o.bits > 0) file.use_device();  // for the plan
    const std::shared_ptr<llama_model> owner = file.model();
    llama_model* model = owner.get();
    const llama_vocab* vocab = llama_model_get_vocab(model);
    const int trained = llama_model_n_ctx_train(model), longest = trained > 0 ? std::min(trained, o.n_tokens) : o.n_tokens;
    file.set_caches({});  // f16
    const llama::Calibration text = choose_text(vocab, o, longest);
    Inspection r;
    r.model = llama::identify_model(file.path()).name, r.text = text.source, r.n_tokens = static_cast<int>(text.n_tokens());
    r.outlier_ratio = o.outlier_ratio;
    KvStatistics statistics;
    {
        const auto length = static_cast<int>(text.sequences[0].size());
        llama::KvProbe probe(file, length, o.n_threads);  // gone before the plan: its cache takes as much as the model's own
        for (const auto& tokens : text.sequences) probe.run(tokens, [&](const llama::KvRows& rows) { statistics.add(rows); });
    }
    r.layers = statistics.layers(o.outlier_ratio);
    if (r.layers.empty()) throw llama::Error("this model writes no keys into a cache that could be looked at");
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
            file,
            {.calib_file = o.text_file, .calib_tokens = o.text_file.empty() ? 0 : std::max(128, r.n_tokens), .n_threads = o.n_threads});
        r.plan = planner.plan({o.bits, 0}, 0);
    }
    return r;
}

}  // namespace turboquant::measure
