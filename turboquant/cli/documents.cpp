#include "turboquant/cli/documents.h"

#include "nlohmann/json.hpp"

namespace turboquant::cli {

using namespace measure;

namespace {

/// Who made the format: what pictures tell apart.
const char* family(const EvalResult& r) {
    if (r.floor) return "floor";
    if (!r.spec.ours) return "llama.cpp";
    return r.plan ? "planned" : "turboquant";
}

}  // namespace

nlohmann::ordered_json to_json(const std::vector<EvalResult>& results) {
    auto rows = nlohmann::ordered_json::array();
    for (const EvalResult& r : results) {
        const auto& other = r.best_other;
        rows.push_back({{"kv", r.spec.name},
                        {"family", family(r)},
                        {"bits_per_value", r.memory.bits_per_value},
                        {"kv_bytes", static_cast<std::int64_t>(r.memory.bytes)},
                        {"ppl", r.score.ppl},
                        {"ppl_f16", r.score.ppl_ref},
                        {"mean_kld", r.score.mean_kld},
                        {"mean_kld_error", r.score.mean_kld_error},
                        {"median_kld", r.score.median_kld},
                        {"kld_99", r.score.kld_99},
                        {"kld_999", r.score.kld_999},
                        {"overlap", r.score.overlap},
                        {"same_top", r.score.same_top},
                        {"tokens", r.score.tokens},
                        {"floor", r.floor},
                        {"best_other", other ? nlohmann::ordered_json{{"kv", other->other},
                                                                      {"difference", other->difference.mean},
                                                                      {"error", other->difference.error}}
                                             : nlohmann::ordered_json(nullptr)}});
    }
    return rows;
}

nlohmann::ordered_json to_json(const std::vector<DecodeSpeed>& speeds) {
    auto rows = nlohmann::ordered_json::array();
    for (const DecodeSpeed& s : speeds)
        rows.push_back({{"kv", s.kv}, {"depth", s.depth}, {"ms", s.ms}, {"tokens_per_s", s.tokens_per_s()}});
    return rows;
}

nlohmann::ordered_json to_json(const std::vector<NeedleResult>& results) {
    auto rows = nlohmann::ordered_json::array();
    for (const NeedleResult& r : results)
        for (std::size_t i = 0; i < r.found.size(); i++)
            rows.push_back(
                {{"kv", r.kv}, {"ctx", r.ctx}, {"depth", depth_percent(i, r.found.size())}, {"found", r.found[i]}, {"total", r.per_depth}});
    return rows;
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

}  // namespace turboquant::cli
