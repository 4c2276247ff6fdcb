#include "turboquant/planner/plan.h"

#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>

#include "nlohmann/json.hpp"
#include "turboquant/codec/tile.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant {
namespace {

using Json = nlohmann::ordered_json;

Json number_or_null(const std::optional<double>& x) { return x ? Json(*x) : Json(); }

HeadCodecs codecs_of(const Json& words, const char* side, int layer) {
    try {
        return parse_head_codecs(words.get<std::string>());
    } catch (const std::invalid_argument& e) {
        throw std::invalid_argument(std::string(side) + " of layer " + std::to_string(layer) + ": " + e.what());
    }
}

CodecId codec_of(const Json& word) { return parse_head_codecs(word.get<std::string>()).of(0); }

Json to_json(const Measurements& m) {
    const auto name = [](CodecId c) { return std::string(codec_info(c).name); };
    const auto responses = [&](const std::vector<Response>& rows) {
        Json j = Json::object();
        for (const Response& r : rows) j[name(r.codec)] = r.kld;
        return j;
    };
    Json slots = Json::array(), scales = Json::object();
    for (const MeasuredSlot& s : m.slots)
        slots.push_back({s.layer, s.side == Side::key ? "k" : "v", s.head_dim, s.of_heads, s.head, s.window, s.kld, s.error, s.expected});
    for (const auto& [layer, letters] : m.key_scales) scales[std::to_string(layer)] = letters;
    return {{"text", m.text},
            {"tokens", m.tokens},
            {"layers", m.n_layers},
            {"context", m.n_ctx_train},
            {"options", to_string(m.options)},
            {"k_format", name(m.k_format)},
            {"v_format", name(m.v_format)},
            {"floor", m.floor},
            {"cell_bits", m.cell_bits},
            {"scale_gain", m.scale_gain},
            {"k_responses", responses(m.k_responses)},
            {"v_responses", responses(m.v_responses)},
            {"slots", slots},
            {"key_scales", scales}};
}

Measurements measurements_of(const Json& j) {
    Measurements m;
    m.text = j.value("text", ""), m.tokens = j.value("tokens", 0);
    m.n_layers = j.at("layers").get<int>(), m.n_ctx_train = j.at("context").get<int>();
    m.options = parse_spec_options(j.value("options", ""));
    m.k_format = codec_of(j.at("k_format")), m.v_format = codec_of(j.at("v_format"));
    m.floor = j.value("floor", 0.0), m.cell_bits = j.value("cell_bits", 0.0), m.scale_gain = j.value("scale_gain", 1.0);
    for (const auto& [key, rows] : {std::pair{"k_responses", &m.k_responses}, {"v_responses", &m.v_responses}})
        for (const auto& [word, kld] : j.at(key).items()) rows->push_back({codec_of(word), kld.get<double>()});
    for (const Json& row : j.at("slots")) {
        MeasuredSlot s;
        s.layer = row.at(0).get<int>(), s.side = row.at(1).get<std::string>() == "k" ? Side::key : Side::value;
        s.head_dim = row.at(2).get<int>(), s.of_heads = row.at(3).get<int>(), s.head = row.at(4).get<int>();
        s.window = row.at(5).get<std::int64_t>(), s.kld = row.at(6).get<double>(), s.error = row.at(7).get<double>();
        if (row.size() > 8) s.expected = row.at(8).get<std::vector<double>>();
        if (!s.expected.empty() && s.expected.size() != (s.side == Side::key ? std::size(kKeyErrors) : 1))
            throw std::invalid_argument("its measurements hold errors of another form; make the plan again with `turboquant plan`");
        if (!head_dim_supported(s.head_dim) || s.of_heads < 1 || s.head >= s.of_heads || s.layer < 0)
            throw std::invalid_argument("its measurements hold a slot that cannot be; make the plan again with `turboquant plan`");
        m.slots.push_back(s);
    }
    for (const auto& [layer, letters] : j.at("key_scales").items()) {
        parse_scales(letters.get<std::string>());
        m.key_scales[std::stoi(layer)] = letters.get<std::string>();
    }
    return m;
}

Plan from_json(const Json& j) {
    if (!j.is_object() || !j.contains("turboquant_plan"))
        throw std::invalid_argument("no \"turboquant_plan\" in it; make one with `turboquant plan`");
    if (const int version = j.at("turboquant_plan").get<int>(); version != kPlanVersion)
        throw std::invalid_argument("version " + std::to_string(version) + " of the form, this program knows version " +
                                    std::to_string(kPlanVersion) + "; make the plan again with `turboquant plan`");
    Plan p;
    const Json& model = j.at("model");
    p.model_hash = model.at("hash").get<std::string>();
    p.model_name = model.value("name", "");
    p.budget = j.value("budget", 0.0);
    p.bits_per_value = j.value("bits_per_value", 0.0);
    const auto optional_number = [&](const char* key) {
        return j.contains(key) && !j.at(key).is_null() ? std::optional(j.at(key).get<double>()) : std::nullopt;
    };
    p.predicted_kld = optional_number("predicted_kld");
    p.measured_kld = optional_number("measured_kld");
    if (j.contains("calibration")) {
        p.calibration = j.at("calibration").value("source", "");
        p.calibration_tokens = j.at("calibration").value("tokens", 0);
    }
    p.options = parse_spec_options(j.value("options", ""));
    if (j.contains("race"))
        for (const Json& r : j.at("race")) p.race.push_back({r.at("formats"), r.at("kld"), r.at("behind"), r.at("error")});
    if (j.contains("measurements")) p.measurements = measurements_of(j.at("measurements"));
    std::set<int> seen;
    for (const Json& row : j.at("layers")) {
        PlannedLayer l;
        l.layer = row.at("layer").get<int>();
        if (l.layer < 0 || !seen.insert(l.layer).second)
            throw std::invalid_argument("layer " + std::to_string(l.layer) + " is negative or named twice; name each layer once");
        l.k = codecs_of(row.at("k"), "keys", l.layer);
        if (!row.at("v").is_null()) l.v = codecs_of(row.at("v"), "values", l.layer);
        l.k_kld = row.value("k_kld", 0.0);
        l.v_kld = row.value("v_kld", 0.0);
        l.k_scales = row.value("k_scales", "");
        parse_scales(l.k_scales);
        p.layers.push_back(l);
    }
    if (p.layers.empty()) throw std::invalid_argument("it names no layers");
    p.n_layers = model.value("layers", *seen.rbegin() + 1);
    if (*seen.rbegin() >= p.n_layers)
        throw std::invalid_argument("it names layer " + std::to_string(*seen.rbegin()) + " of a model of " + std::to_string(p.n_layers));
    return p;
}

/// The commonest format of a side.
CodecId commonest(const std::map<int, HeadCodecs>& layers) {
    std::map<CodecId, int> count;
    for (const auto& [layer, codecs] : layers)
        if (!codecs.mixed()) count[codecs.of(0)]++;
    CodecId base = CodecId::raw;
    for (const auto& [id, n] : count)
        if (n > count[base]) base = id;
    return base;
}

}  // namespace

std::string to_json(const Plan& p) {
    Json head{{"turboquant_plan", kPlanVersion},
              {"model", {{"hash", p.model_hash}, {"name", p.model_name}, {"layers", p.n_layers}}},
              {"budget", p.budget},
              {"bits_per_value", p.bits_per_value},
              {"predicted_kld", number_or_null(p.predicted_kld)},
              {"measured_kld", number_or_null(p.measured_kld)},
              {"calibration", {{"source", p.calibration}, {"tokens", p.calibration_tokens}}},
              {"options", to_string(p.options)}};
    if (!p.race.empty()) {
        head["race"] = Json::array();
        for (const RaceRow& r : p.race)
            head["race"].push_back({{"formats", r.formats}, {"kld", r.kld}, {"behind", r.behind}, {"error", r.error}});
    }
    if (p.measurements) head["measurements"] = to_json(*p.measurements);
    std::string out = "{\n";
    for (const auto& [key, value] : head.items()) out += "  " + Json(key).dump() + ": " + value.dump() + ",\n";
    out += "  \"layers\": [";
    for (const PlannedLayer& l : p.layers) {
        Json row{
            {"layer", l.layer}, {"k", to_string(l.k)}, {"v", l.v ? Json(to_string(*l.v)) : Json()}, {"k_kld", l.k_kld}, {"v_kld", l.v_kld}};
        if (!l.k_scales.empty()) row["k_scales"] = l.k_scales;
        out += (&l == p.layers.data() ? "\n    " : ",\n    ") + row.dump();
    }
    return out + "\n  ]\n}\n";
}

Plan parse_plan(std::string_view json) {
    try {
        return from_json(Json::parse(json));
    } catch (const Json::exception& e) {
        throw std::invalid_argument(std::string("not the JSON of a plan: ") + e.what());
    }
}

Plan read_plan_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    std::ostringstream text;
    if (!in || !(text << in.rdbuf())) throw std::invalid_argument("cannot read plan file '" + path + "'; check the path");
    try {
        return parse_plan(text.view());
    } catch (const std::invalid_argument& e) {
        throw std::invalid_argument("plan file '" + path + "': " + e.what());
    }
}

void write_plan_file(const Plan& plan, const std::string& path) {
    std::ofstream out(path, std::ios::binary);
    out << to_json(plan);
    if (!out.flush()) throw std::runtime_error("cannot write plan file '" + path + "'; check that its folder exists and has room");
}

void check_model(const Plan& plan, std::string_view model_hash, std::string_view model_name) {
    if (plan.model_hash == model_hash) return;
    throw std::invalid_argument("this plan was made for another model: " + plan.model_name + " (" + plan.model_hash + "), not for " +
                                std::string(model_name) + " (" + std::string(model_hash) +
                                "). Make one for this model with `turboquant plan`");
}

void check_slots(const Plan& plan, const std::set<std::pair<int, Side>>& slots) {
    std::set<std::pair<int, Side>> planned;
    for (const PlannedLayer& l : plan.layers) {
        planned.insert({l.layer, Side::key});
        if (l.v) planned.insert({l.layer, Side::value});
    }
    const auto first_missing = [](const auto& from, const auto& in) -> std::string {
        for (const auto& slot : from)
            if (!in.contains(slot)) return (slot.second == Side::key ? "keys of layer " : "values of layer ") + std::to_string(slot.first);
        return {};
    };
    const std::string absent = first_missing(planned, slots), unplanned = first_missing(slots, planned);
    if (!absent.empty() || !unplanned.empty())
        throw std::invalid_argument("the plan was made for another model (" + plan.model_name + "): " +
                                    (absent.empty() ? "it does not name the " + unplanned + " of this one"
                                                    : "it names the " + absent + ", which this one does not have") +
                                    ". Make one for this model with `turboquant plan`");
}

KvSpec to_spec(const Plan& plan) {
    KvSpec spec;
    spec.options() = plan.options;
    for (const PlannedLayer& l : plan.layers) {
        spec.set(Side::key, l.layer, l.k);
        if (l.v) spec.set(Side::value, l.layer, *l.v);
        if (!l.k_scales.empty()) spec.k_scales[l.layer] = l.k_scales;
    }
    spec.k = commonest(spec.k_layers), spec.v = commonest(spec.v_layers);
    std::erase_if(spec.k_layers, [&](const auto& l) { return l.second == spec.k; });
    std::erase_if(spec.v_layers, [&](const auto& l) { return l.second == spec.v; });
    return spec;
}

}  // namespace turboquant
