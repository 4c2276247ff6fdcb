#include "turboquant/measure/planner.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/calibration.h"
#include "turboquant/llama/error.h"
#include "turboquant/measure/kv_statistics.h"
#include "turboquant/planner/key_balance.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant::measure {
namespace {

/// Multiplications of all runs together: about two minutes on two cores for models of up to 135 million parameters, and more, but less than in
/// proportion, for larger ones. Fixed, so that the plan does not depend on the machine's speed.
constexpr double kWork = 3e12, kWorkParameters = 1.35e8, kWorkGrowth = 0.6;
constexpr double kWorkOfToken = 2e7;  // beside the weights: codes, logits, scores
constexpr int kSequence = 1024;       // at most: errors of keys cost more the longer the context
constexpr int kLeastTokens = 128;
/// Windows of long contexts are held to this share of a sequence, or little else would be measured.
constexpr int kWindowShare = 32;

/// What slots are measured in. Where nothing rounds, as near to the formats of a plan as can be; where weights are quantized, in formats whose
/// error stands out of the floor.
constexpr CodecId kFineKeys = CodecId::tcq3, kFineValues = CodecId::tcq2, kCoarse = CodecId::turbo2;
/// What all keys, and all values, are measured in: the response of a side to coarser formats.
constexpr CodecId kResponses[] = {CodecId::tcq1, CodecId::tcq2, CodecId::tcq3, CodecId::tcq4};
/// To try scales of key channels with.
constexpr CodecId kScalesTried = CodecId::tcq3;

constexpr double kPositionBits = 32;  // of a cell, before the cache itself has told
constexpr std::size_t kUniformContenders = 3;
constexpr double kEvenness[] = {0, 1};  // of more plans in the race: the measurements as they are, and their mean

int sequence_length(int tokens) { return std::max(64, std::min(kSequence, tokens) / 64 * 64); }

}  // namespace

Planner::Planner(llama::ModelFile& file, PlannerOptions options)
    : file_(&file), id_(llama::identify_model(file.path())), options_(std::move(options)) {
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    file.use_device();
    model_ = file.model();
    measured_.n_layers = llama_model_n_layer(model_.get());
    measured_.n_ctx_train = llama_model_n_ctx_train(model_.get());
    measured_.options = options_.spec;
    const llama::KvProbe probe(*file_, 4 * kSequence, options_.n_threads);
    shapes_ = probe.layers();
    for (const llama::KvLayerShape& l : shapes_) {
        const std::int64_t window = l.n_cells < probe.n_ctx() ? l.n_cells : 0;
        measured_.slots.push_back({l.layer, Side::key, l.k_head_dim, l.k_heads, -1, window});
        if (l.v_heads) measured_.slots.push_back({l.layer, Side::value, l.v_head_dim, l.v_heads, -1, window});
    }
    for (const MeasuredSlot& s : measured_.slots)
        if (!head_dim_supported(s.head_dim))
            throw llama::Error(fmt::format("layer {} has heads of {}, for which turboquant has no formats", s.layer, s.head_dim));
}

/// Slots, both sides' responses, scales tried, floors, the reference.
double Planner::n_runs() const { return static_cast<double>(measured_.slots.size() + 2 * std::size(kResponses) + 2 + 3 + 1); }

double Planner::affordable_tokens() const {
    const auto n = static_cast<double>(llama_model_n_params(model_.get()));
    return kWork * std::max(1.0, std::pow(n / kWorkParameters, kWorkGrowth)) / ((n + kWorkOfToken) * n_runs());
}

std::vector<MeasuredSlot> Planner::per_head() const {
    std::vector<MeasuredSlot> heads;
    for (const MeasuredSlot& s : measured_.slots)
        for (int h = 0; h < s.of_heads; h++) {
            heads.push_back(s);
            if (s.of_heads > 1) heads.back().head = h;
        }
    return heads;
}

// One sequence more than is measured on: for the race.
void Planner::write_text() {
    // Heads apart if that leaves a whole sequence to measure each on.
    const std::vector<MeasuredSlot> layers = measured_.slots;
    measured_.slots = per_head();
    if (!options_.per_head && affordable_tokens() < std::max(kSequence, options_.calib_tokens)) measured_.slots = layers;
    const int tokens = options_.calib_tokens ? options_.calib_tokens
                                             : static_cast<int>(std::clamp(affordable_tokens(), 1.0 * kLeastTokens, 2.0 * kSequence));
    const int length = sequence_length(tokens), n_sequences = std::max(1, tokens / length);
    file_->monitor().note(fmt::format(
        "plan: {} layers, {} slots{}, calibration on {} x {} tokens, {}", measured_.n_layers, measured_.slots.size(),
        measured_.slots.size() > layers.size() ? " (per KV head)" : "", n_sequences, length,
        options_.calib_file.empty() ? fmt::format("which the model writes (seed {})", options_.seed) : "from " + options_.calib_file));
    text_ = options_.calib_file.empty()
                ? llama::generate_text(model_.get(), n_sequences + 1, length, options_.seed, options_.n_threads, file_->monitor())
                : llama::text_from_file(llama_model_get_vocab(model_.get()), options_.calib_file, n_sequences + 1, length);
    race_text_ = {text_.source, {text_.sequences.back()}};
    if (text_.sequences.size() > 1) text_.sequences.pop_back();  // a short file: the race is on the same text
    measured_.text = text_.source, measured_.tokens = static_cast<int>(text_.n_tokens());
}

void Planner::measure_all(int n_ctx) {
    write_text();
    const int length = static_cast<int>(text_.sequences[0].size());
    const WindowSizes wanted = options_.spec.windows.resolve(n_ctx), at_least = options_.spec.windows.resolve(length);
    const auto held = [&](int given, int most, int least) {
        return given != WindowSizes::kAuto ? given : std::max(least, std::min(most, length / kWindowShare));
    };
    windows_ = {held(options_.spec.windows.sink, wanted.sink, at_least.sink),
                held(options_.spec.windows.recent, wanted.recent, at_least.recent)};
    llama::Work work(file_->monitor(), "plan", n_runs());
    meter_ = std::make_unique<KldMeter>(*file_, text_, spec_of(uniform_spec(CodecId::raw, CodecId::raw)),
                                        llama::ContextOptions{.n_threads = options_.n_threads});
    const llama::KvMemory& m = meter_->reference_memory();
    measured_.cell_bits = std::max(0.0, m.bits_per_value - 16) * measured_.values(length) / length;
    work.add(1);
    const bool coarse = file_->quantized();
    measured_.k_format = coarse ? kCoarse : kFineKeys, measured_.v_format = coarse ? kCoarse : kFineValues;
    measure_floors(work);
    measure_scales(work);
    measure_responses(work);
    measure_slots(work);
}

// Any difference at all, however small, makes quantized layers behind it round differently: that much is no error of the format. The fewer layers
// are behind it, the less: measured at three depths, linear between.
void Planner::measure_floors(llama::Work& work) {
    if (!file_->quantized()) return work.add(3);
    const auto n = static_cast<int>(shapes_.size());
    std::map<int, double> seen;
    for (const int i : {0, n / 2, n - 1}) {
        MeasuredSlot s;
        for (const MeasuredSlot& m : measured_.slots)
            if (m.layer == shapes_[static_cast<std::size_t>(i)].layer && m.side == Side::key) s = m;
        s.head = -1;
        seen[i] = meter_->measure(spec_of(slot_spec(s, CodecId::turbo8))).mean;
        work.add(1);
    }
    measured_.floor = seen[0];
    for (int i = 0; i < n; i++) {
        const auto above = seen.lower_bound(i), below = above->first == i ? above : std::prev(above);
        const double share = above == below ? 0 : static_cast<double>(i - below->first) / (above->first - below->first);
        floors_[shapes_[static_cast<std::size_t>(i)].layer] = (1 - share) * below->second + share * above->second;
    }
}

// Scales from what keys and queries of the calibration text look like; kept if they pay when measured.
void Planner::measure_scales(llama::Work& work) {
    if (!options_.spec.offset) return work.add(2);
    llama::KvProbe probe(*file_, static_cast<int>(text_.sequences.at(0).size()), options_.n_threads);
    KvStatistics statistics;
    for (const auto& tokens : text_.sequences) probe.run(tokens, [&](const llama::KvRows& rows) { statistics.add(rows); });
    std::map<int, std::string> scales;
    for (const llama::KvLayerShape& l : shapes_) {
        const std::vector<double> variance = statistics.key_variance(l.layer), energy = statistics.query_energy(l.layer);
        const auto d = static_cast<std::size_t>(l.k_head_dim);
        if (!l.rope || l.v_heads == 0 || variance.size() != d * static_cast<std::size_t>(l.k_heads) || energy.size() != variance.size())
            continue;
        std::vector<std::pair<int, int>> pairs;
        for (int i = 0; i < l.rope_params.n_dims / 2; i++) pairs.push_back(rope_pair(l.rope_params, i));
        for (std::size_t head = 0; head < variance.size(); head += d)
            scales[l.layer] += scale_letters(balance_keys(std::span(variance).subspan(head, d), std::span(energy).subspan(head, d), pairs));
    }
    if (scales.empty()) return work.add(2);
    KvSpec formats = uniform_spec(CodecId::raw, CodecId::raw);
    for (const auto& [layer, letters] : scales) formats.set(Side::key, layer, kScalesTried);
    const double without = meter_->measure(spec_of(formats)).mean;
    work.add(1);
    measured_.key_scales = scales;
    measured_.scale_gain = meter_->measure(spec_of(formats)).mean / without;
    if (!(measured_.scale_gain < 1)) measured_.key_scales.clear();
    work.add(1);
}

void Planner::measure_responses(llama::Work& work) {
    const bool values = std::ranges::any_of(measured_.slots, [](const MeasuredSlot& s) { return s.side == Side::value; });
    for (const CodecId codec : kResponses) {
        const auto respond = [&](CodecId k, CodecId v) {
            return std::max(1e-9, meter_->measure(spec_of(uniform_spec(k, v))).mean - measured_.floor);
        };
        measured_.k_responses.push_back({codec, respond(codec, CodecId::raw)});
        work.add(1);
        if (values) measured_.v_responses.push_back({codec, respond(CodecId::raw, codec)});
        work.add(1);
    }
}

void Planner::measure_slots(llama::Work& work) {
    for (MeasuredSlot& s : measured_.slots) {
        const MeanError d = meter_->measure(spec_of(slot_spec(s, measured_.slot_format(s.side))));
        s.kld = d.mean - (floors_.contains(s.layer) ? floors_.at(s.layer) : 0), s.error = d.error;
        work.add(1);
    }
}

// With the options, windows and scales that hold for all layers.
llama::CacheSpec Planner::spec_of(KvSpec formats) const {
    formats.options() = options_.spec;
    formats.windows = windows_;
    formats.k_scales = measured_.key_scales;
    return {brief_text(formats), formats};
}

// Beside a head that is measured alone the others are as good as exact.
KvSpec Planner::slot_spec(const MeasuredSlot& slot, CodecId codec) const {
    std::vector<CodecId> heads(static_cast<std::size_t>(slot.of_heads), slot.head < 0 ? codec : CodecId::turbo8);
    heads[static_cast<std::size_t>(std::max(0, slot.head))] = codec;
    KvSpec spec = uniform_spec(CodecId::raw, CodecId::raw);
    spec.set(slot.side, slot.layer, HeadCodecs(heads));
    return spec;
}

Plan Planner::plan(const Budget& budget, int n_ctx) {
    if (n_ctx == 0) n_ctx = measured_.n_ctx_train;
    const double bits = budget_bits(measured_, budget, n_ctx);
    Plan best;
    if (!meter_) {
        // What cannot be is told before minutes are spent.
        Measurements shape = measured_;
        shape.k_responses = shape.v_responses = {{CodecId::turbo2, 1}};
        shape.cell_bits = kPositionBits;
        allocate_formats(shape, bits, n_ctx);
        measure_all(n_ctx);
    }
    std::vector<Plan> contenders{allocate_formats(measured_, bits, n_ctx, default_evenness(measured_))};
    if (options_.race) {
        for (const double evenness : kEvenness) contenders.push_back(allocate_formats(measured_, bits, n_ctx, evenness));
        if (const std::optional<Plan> by_rules = rule_plan(measured_, bits, n_ctx)) contenders.push_back(*by_rules);
        std::vector<UniformPair> pairs = uniform_pairs(measured_, bits, n_ctx);
        pairs.resize(std::min(pairs.size(), kUniformContenders));
        for (const UniformPair& p : pairs) contenders.push_back(uniform_plan(measured_, p));
        best = race(std::move(contenders));
    } else {
        best = contenders.front();
    }
    best.model_hash = id_.hash, best.model_name = id_.name;
    best.budget = bits / measured_.values(n_ctx);
    best.measurements = measured_;
    return best;
}

Plan Planner::race(std::vector<Plan> contenders) {
    if (!race_meter_)
        race_meter_ = std::make_unique<KldMeter>(*file_, race_text_, spec_of(uniform_spec(CodecId::raw, CodecId::raw)),
                                                 llama::ContextOptions{.n_threads = options_.n_threads});
    llama::Work work(file_->monitor(), "race", static_cast<double>(contenders.size()));
    struct Runner {
        const Plan* plan;
        const std::vector<double>* kld;
        double mean;
    };
    std::vector<Runner> runners;
    for (const Plan& p : contenders) {
        KvSpec spec = to_spec(p);
        spec.windows = windows_;
        std::vector<double>& kld = raced_[to_string(spec)];
        if (kld.empty()) kld = race_meter_->divergences({brief_text(spec), spec});
        runners.push_back({&p, &kld, mean_error(kld).mean});
        work.add(1);
    }
    std::ranges::stable_sort(runners, {}, &Runner::mean);
    Plan winner = *runners.front().plan;
    for (const Runner& r : runners) {
        std::vector<double> behind;
        for (std::size_t i = 0; i < r.kld->size(); i++) behind.push_back((*r.kld)[i] - (*runners.front().kld)[i]);
        const auto [mean, error] = mean_error(behind);
        const std::string formats = brief_text(to_spec(*r.plan));
        if (std::ranges::none_of(winner.race, [&](const RaceRow& row) { return row.formats == formats; }))
            winner.race.push_back({formats, r.mean, mean, error});
    }
    return winner;
}

MeanError Planner::measure(const Plan& plan) {
    KvSpec spec = to_spec(plan);
    spec.windows = windows_;
    return meter_->measure({brief_text(spec), spec});
}

}  // namespace turboquant::measure
