// A plan: the formats chosen for one model, with what was known when they were chosen. A small JSON file, readable and editable.
//
//   {
//     "turboquant_plan": 1,                         version of this form
//     "model": {"hash": "...", "name": "...", "layers": 8},
//     "budget": 4.25,                               bits per value asked for; 0: none
//     "bits_per_value": 4.19,                       of the formats below, everything that is stored counted
//     "predicted_kld": 0.0027,                      mean, nats; null: unknown
//     "measured_kld": 0.0028,                       on the calibration text; null: not measured
//     "calibration": {"source": "...", "tokens": 4096},
//     "options": "offset=on",                       options of the SPEC (spec/kv_spec.h), for all layers
//     "race": [{"formats": "k=tcq4,v=tcq3,...", "kld": 0.0028, "behind": 0, "error": 0}, ...],   what it was held against, the best first
//     "measurements": {...},                        what it was made from, for other budgets (measurements.h); may be left out
//     "layers": [{"layer": 0, "k": "turbo5", "v": "turbo4", "k_kld": 0.0002, "v_kld": 0.0001, "k_scales": "aaZZbb..."}, ...]
//   }
// k and v name one format, or one per KV head: "tcq3/tcq5".
// k_scales, where keys are scaled: a letter per channel of all KV heads (spec/channel_scales.h).
// Only turboquant_plan, model.hash and layers with their k and v are required, so that a plan can be written by hand; v is null in models
// without V.
#pragma once

#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "turboquant/planner/measurements.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant {

inline constexpr int kPlanVersion = 1;

struct PlannedLayer {
    int layer = 0;
    HeadCodecs k = CodecId::raw;
    std::optional<HeadCodecs> v;  ///< none: the model stores no values (MLA)
    double k_kld = 0, v_kld = 0;  ///< predicted share of the divergence
    std::string k_scales{};       ///< letters, all KV heads; empty: keys are not scaled

    friend bool operator==(const PlannedLayer&, const PlannedLayer&) = default;
};

/// A choice of formats on text that the measurements did not see.
struct RaceRow {
    std::string formats;
    double kld = 0;                ///< mean, nats
    double behind = 0, error = 0;  ///< behind the winner, on the same positions, with its standard error

    friend bool operator==(const RaceRow&, const RaceRow&) = default;
};

struct Plan {
    std::string model_hash;  ///< of the model it was made for; compared as text
    std::string model_name;
    int n_layers = 0;
    double budget = 0, bits_per_value = 0;
    std::optional<double> predicted_kld, measured_kld;
    std::string calibration;  ///< description of the text
    int calibration_tokens = 0;
    SpecOptions options;        ///< for all layers
    std::vector<RaceRow> race;  ///< ascending by kld: the plan itself is the first
    std::optional<Measurements> measurements;
    std::vector<PlannedLayer> layers;  ///< those with a KV cache, ascending

    friend bool operator==(const Plan&, const Plan&) = default;
};

/// JSON text as above, a layer per line, ends with a line break. parse_plan(to_json(p)) == p.
std::string to_json(const Plan& plan);

/// Throws std::invalid_argument: no JSON (with the place), another version, an unknown codec (with the known ones), a missing or doubled
/// layer.
Plan parse_plan(std::string_view json);

/// Reads a file; throws std::invalid_argument that names it.
Plan read_plan_file(const std::string& path);
/// Throws std::runtime_error if the file cannot be written.
void write_plan_file(const Plan& plan, const std::string& path);

/// Throws std::invalid_argument, naming both models, if the plan was made for another one.
void check_model(const Plan& plan, std::string_view model_hash, std::string_view model_name);

/// Throws std::invalid_argument, naming the layers, if a cache of these layers and sides is not the one the plan was made for.
void check_slots(const Plan& plan, const std::set<std::pair<int, Side>>& slots);

/// The cache that the plan describes: the commonest format of each side as k and v, the others layer by layer, with the options and the
/// scales of the keys.
KvSpec to_spec(const Plan& plan);

}  // namespace turboquant
