#include "turboquant/measure/planner.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <span>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/calibration.h"
#include "turboquant/llama/calibration_text.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/attention_error.h"
#include "turboquant/measure/kv_statistics.h"
#include "turboquant/planner/key_balance.h"
#include "turboquant/planner/sensitivity.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant::measure {
namespace {

/// Multiplications of all runs together, the race among them: a minute or two on two cores for models of up to 135 million parameters, and more, but
/// less than in proportion, for larger ones. Fixed, so that the plan does not depend on the machine's speed.
constexpr double kWork = 3.2e12, kWorkParameters = 1.35e8, kWorkGrowth = 0.6;
constexpr double kWorkOfToken = 2e7;  // beside the weights: codes, logits, scores
constexpr int kSequence = 1024;       // at most: errors of keys cost more the longer the context
constexpr int kLeastTokens = 128;
constexpr int kLeastGroups = 4;  // of a side, however little time there is
/// Windows of long contexts are held to this share of a sequence, or little else would be measured.
constexpr int kWindowShare = 32;

/// What groups of layers are measured in. Where nothing rounds, as near to the formats of a plan as can be; where weights are quantized, in formats
/// whose error stands out of the floor.
constexpr CodecId kFineKeys = CodecId::tcq3, kFineValues = CodecId::tcq2, kCoarse = CodecId::turbo2;
/// What all keys, and all values, are measured in: how far the expected growth with the squared error holds.
constexpr CodecId kKeyResponses[] = {CodecId::tcq4, CodecId::tcq2}, kValueResponses[] = {CodecId::tcq3, CodecId::tcq1};

constexpr double kPositionBits = 32;  // of a cell, before the cache itself has told
constexpr std::size_t kUniformContenders = 3;
constexpr double kContenders = 3 + kUniformContenders;
constexpr int kLookedAt = 2;     // sequences
constexpr double kLonger = 1.5;  // than those that groups are measured on
/// Runs over the longer sequences: a look at each (and its arithmetic), scales tried (and the race's reference). Runs over the others beside those of
/// groups: the reference, responses, floors.
constexpr double kLook = 1.5 * kLookedAt, kScaleRuns = 3;
constexpr double kShortRuns = 1 + std::size(kKeyResponses) + std::size(kValueResponses), kFloorRuns = 3;

constexpr double kLeastKld = 1e-9;

void add_share(MeasuredSlot& slot, const HeadError& error, double share) {
    const std::vector<double> more = slot.side == Side::key ? error.keys : std::vector<double>{error.values};
    slot.expected.resize(more.size(), 0);
    for (std::size_t i = 0; i < more.size(); i++) slot.expected[i] += share * more[i];
}

int sequence_length(double tokens) { return std::max(64, static_cast<int>(std::min<double>(kSequence, tokens)) / 64 * 64); }

}  // namespace

Planner::Planner(llama::ModelFile& file, PlannerOptions options)
    : file_(&file), id_(llama::identify_model(file.path())), options_(std::move(options)) {
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    file.use_device();
    model_ = file.model();
    measured_.n_layers = llama_model_n_layer(model_.get());
    measured_.n_ctx_train = llama_model_n_ctx_train(model_.get());
    measured_.options = options_.spec;
    const llama::KvProbe probe(*file_, 4 * kSequence, options_.n_threads, llama::KvProbe::kUsualBatch);
    shapes_ = probe.layers();
    for (const llama::KvLayerShape& l : shapes_) {
        const std::int64_t window = l.n_cells < probe.n_ctx() ? l.n_cells : 0;
        for (const Side side : {Side::key, Side::value}) {
            const int heads = side == Side::key ? l.k_heads : l.v_heads, head_dim = side == Side::key ? l.k_head_dim : l.v_head_dim;
            for (int h = 0; h < heads; h++) measured_.slots.push_back({l.layer, side, head_dim, heads, heads > 1 ? h : -1, window});
        }
    }
    for (const MeasuredSlot& s : measured_.slots)
        if (!head_dim_supported(s.head_dim))
            throw llama::Error(fmt::format("layer {} has heads of {}, for which turboquant has no formats", s.layer, s.head_dim));
}

/// Runs over so many tokens that the work amounts to.
double Planner::affordable_runs(int tokens) const {
    const auto n = static_cast<double>(llama_model_n_params(model_.get()));
    return kWork * std::max(1.0, std::pow(n / kWorkParameters, kWorkGrowth)) / ((n + kWorkOfToken) * tokens);
}

int Planner::n_layers_of(Side side) const {
    std::set<int> layers;
    for (const MeasuredSlot& s : measured_.slots)
        if (s.side == side) layers.insert(s.layer);
    return static_cast<int>(layers.size());
}

// As long a text as leaves time for a few groups; then as many groups as there is time for, up to a layer each. Looks and races are over longer ones.
void Planner::write_text() {
    const int layers = n_layers_of(Side::key), least_groups = std::min(kLeastGroups, layers);
    const double short_runs = kShortRuns + (file_->quantized() ? kFloorRuns : 0),
                 long_runs = kLook + kScaleRuns + (options_.race ? kContenders : 0), others = short_runs + kLonger * long_runs;
    const double whole = affordable_runs(1) / (others + 2 * least_groups);
    const int tokens = options_.calib_tokens ? options_.calib_tokens : static_cast<int>(std::clamp<double>(whole, kLeastTokens, kSequence));
    const int length = sequence_length(tokens), n_sequences = std::max(1, tokens / length);
    n_groups_ = std::clamp(static_cast<int>((affordable_runs(length) - others) / 2), least_groups, layers);
    choose_text(n_sequences, length, sequence_length(kLonger * length));
    measured_.text = text_.source, measured_.tokens = static_cast<int>(text_.n_tokens());
    file_->monitor().note(fmt::format("plan: {} layers, keys and values measured in {} groups each{}, on {} x {} tokens, {}",
                                      measured_.n_layers, options_.per_head ? "as many" : std::to_string(n_groups_),
                                      options_.per_head ? " as KV heads" : "", text_.sequences.size(), text_.sequences[0].size(),
                                      measured_.text));
}

// For the race: a text of other kinds, or a sequence that nothing else was done with (of a short file, the only one).
void Planner::choose_text(int n_sequences, int length, int longer) {
    const llama_vocab* vocab = llama_model_get_vocab(model_.get());
    if (options_.calib_file.empty() && options_.seed == 0) {
        text_ = llama::text_of_parts(vocab, llama::calibration_parts(), n_sequences, length);
        looked_at_ = llama::text_of_parts(vocab, llama::calibration_parts(), kLookedAt, longer);
        race_text_ = llama::text_of_parts(vocab, llama::held_out_parts(), 1, longer);
        return;
    }
    const int pieces = std::max(n_sequences, kLookedAt) + 1;
    llama::Calibration all;
    if (options_.calib_file.empty()) {
        const llama::ModelOptions& o = file_->options();
        llama::ModelFile as_it_is(
            file_->path(),
            {.backend_path = o.backend_path,
             .gpu_backend = o.gpu_backend,
             .n_gpu_layers = o.n_gpu_layers});  // dequantized weights are several times slower to write with, and say the same
        all = llama::generate_text(as_it_is.model().get(), pieces, longer, options_.seed, options_.n_threads, file_->monitor());
    } else {
        const auto there = static_cast<int>(llama::tokenize(vocab, llama::read_text_file(options_.calib_file), false).size());
        all = llama::text_from_file(vocab, options_.calib_file, pieces, std::min(longer, std::max(kLeastTokens, there / 2 / 64 * 64)));
    }
    race_text_ = {all.source, {all.sequences.back()}};
    if (all.sequences.size() > 1) all.sequences.pop_back();
    text_ = looked_at_ = all;
    looked_at_.sequences.resize(std::min<std::size_t>(all.sequences.size(), kLookedAt));
    text_.sequences.resize(std::min<std::size_t>(all.sequences.size(), static_cast<std::size_t>(n_sequences)));
    for (auto& sequence : text_.sequences) sequence.resize(std::min<std::size_t>(sequence.size(), static_cast<std::size_t>(length)));
}

/// Slots that are measured together: neighbouring layers of a side, or single heads if that is asked for.
std::vector<std::vector<std::size_t>> Planner::groups() const {
    std::vector<std::vector<std::size_t>> out;
    for (const Side side : {Side::key, Side::value}) {
        const int layers = n_layers_of(side), n = std::min(n_groups_, layers);
        int layer = -1, index = -1, last = -1;
        for (std::size_t i = 0; i < measured_.slots.size(); i++) {
            const MeasuredSlot& s = measured_.slots[i];
            if (s.side != side) continue;
            if (s.layer != layer) layer = s.layer, index++;
            const int group = options_.per_head ? static_cast<int>(i) : index * n / layers;
            if (group != last) out.emplace_back(), last = group;
            out.back().push_back(i);
        }
    }
    return out;
}

double Planner::n_runs() const {
    return kShortRuns + kLonger * (kLook + kScaleRuns) + static_cast<double>(groups().size()) + (file_->quantized() ? kFloorRuns : 0);
}

void Planner::measure_all(int n_ctx) {
    write_text();
    const int length = static_cast<int>(text_.sequences[0].size());
    const bool residuals = file_->takes_residuals();
    const WindowSizes wanted = options_.spec.windows.resolve(n_ctx, residuals), at_least = options_.spec.windows.resolve(length, residuals);
    const auto held = [&](int given, int most, int least) {
        return given != WindowSizes::kAuto ? given : std::max(least, std::min(most, length / kWindowShare));
    };
    windows_ = {held(options_.spec.windows.sink, wanted.sink, at_least.sink),
                held(options_.spec.windows.recent, wanted.recent, at_least.recent), wanted.form};
    llama::Work work(file_->monitor(), "plan", n_runs());
    meter_ = std::make_unique<KldMeter>(*file_, text_, spec_of(uniform_spec(CodecId::raw, CodecId::raw)),
                                        llama::ContextOptions{.n_threads = options_.n_threads});
    const llama::KvMemory& m = meter_->reference_memory();
    measured_.cell_bits = std::max(0.0, m.bits_per_value - 16) * measured_.values(length) / length;
    work.add(1);
    const bool coarse = file_->quantized();
    measured_.k_format = coarse ? kCoarse : kFineKeys, measured_.v_format = coarse ? kCoarse : kFineValues;
    measure_floors(work);
    look(work);
    measure_responses(work);
    measure_groups(work);
}

// Any difference at all, however small, makes quantized layers behind it round differently: that much is no error of the format. The fewer layers
// are behind it, the less: measured at three depths, linear between.
void Planner::measure_floors(llama::Work& work) {
    if (!file_->quantized()) return;
    const auto n = static_cast<int>(shapes_.size());
    std::map<int, double> seen;
    for (const int i : {0, n / 2, n - 1}) {
        KvSpec spec = uniform_spec(CodecId::raw, CodecId::raw);
        spec.set(Side::key, shapes_[static_cast<std::size_t>(i)].layer, CodecId::turbo8);
        seen[i] = meter_->measure(spec_of(spec)).mean;
        work.add(1);
    }
    measured_.floor = seen[0];
    for (int i = 0; i < n; i++) {
        const auto above = seen.lower_bound(i), below = above->first == i ? above : std::prev(above);
        const double share = above == below ? 0 : static_cast<double>(i - below->first) / (above->first - below->first);
        floors_[shapes_[static_cast<std::size_t>(i)].layer] = (1 - share) * below->second + share * above->second;
    }
}

// Scales from what keys and queries of the calibration text look like are kept if they pay when measured.
void Planner::look(llama::Work& work) {
    KvStatistics statistics;
    llama::OutputWeights weights(file_->path());
    std::vector<AttentionErrors> errors;  // of each sequence
    {
        llama::KvProbe probe(*file_, static_cast<int>(looked_at_.sequences.at(0).size()), options_.n_threads);
        for (const auto& tokens : looked_at_.sequences) {
            AttentionErrors& of_sequence = errors.emplace_back(shapes_, options_.spec.offset, windows_, weights);
            probe.run(
                tokens,
                [&](const llama::KvRows& rows) {
                    statistics.add(rows);
                    of_sequence.add(rows, static_cast<int>(tokens.size()));
                },
                true);
        }
    }
    std::map<int, std::string> scales;
    for (const llama::KvLayerShape& l : shapes_) {
        const std::vector<double> variance = statistics.key_variance(l.layer), energy = statistics.query_energy(l.layer);
        const auto d = static_cast<std::size_t>(l.k_head_dim);
        if (!options_.spec.offset || !l.rope || l.v_heads == 0 || variance.size() != d * static_cast<std::size_t>(l.k_heads) ||
            energy.size() != variance.size())
            continue;
        std::vector<std::pair<int, int>> pairs;
        for (int i = 0; i < l.rope_params.n_dims / 2; i++) pairs.push_back(rope_pair(l.rope_params, i));
        for (std::size_t head = 0; head < variance.size(); head += d)
            scales[l.layer] += scale_letters(balance_keys(std::span(variance).subspan(head, d), std::span(energy).subspan(head, d), pairs));
    }
    work.add(kLonger * kLook);
    const KvSpec tried = uniform_spec(kKeyResponses[0], CodecId::raw);
    if (!scales.empty()) {
        const double without = race_meter().measure(spec_of(tried)).mean;
        measured_.key_scales = scales;
        measured_.scale_gain = race_meter().measure(spec_of(tried)).mean / without;
        if (!(measured_.scale_gain < 1)) measured_.key_scales.clear();
    }
    work.add(kLonger * kScaleRuns);
    for (const AttentionErrors& of_sequence : errors)
        for (const HeadError& e : of_sequence.heads(measured_.key_scales, options_.n_threads))
            for (MeasuredSlot& s : measured_.slots)
                if (s.layer == e.layer && std::max(0, s.head) == e.head) add_share(s, e, 1.0 / static_cast<double>(errors.size()));
}

void Planner::measure_responses(llama::Work& work) {
    const auto respond = [&](CodecId k, CodecId v) {
        const double kld = meter_->measure(spec_of(uniform_spec(k, v))).mean;
        work.add(1);
        return std::max(kLeastKld, kld - measured_.floor);
    };
    for (const CodecId codec : kKeyResponses) measured_.k_responses.push_back({codec, respond(codec, CodecId::raw)});
    if (n_layers_of(Side::value) == 0) return;
    for (const CodecId codec : kValueResponses) measured_.v_responses.push_back({codec, respond(CodecId::raw, codec)});
}

// What a group costs is shared out among its slots as is expected of them.
void Planner::measure_groups(llama::Work& work) {
    for (const std::vector<std::size_t>& group : groups()) {
        const Side side = measured_.slots[group.front()].side;
        const CodecId codec = measured_.slot_format(side);
        double expected = 0, floor = 0;
        for (const std::size_t i : group) {
            const MeasuredSlot& s = measured_.slots[i];
            expected += s.expected_at(relative_mse(codec, side, s.head_dim));
            if (floors_.contains(s.layer)) floor = std::max(floor, floors_.at(s.layer));
        }
        const MeanError seen = meter_->measure(spec_of(group_spec(group, codec)));
        for (const std::size_t i : group) {
            MeasuredSlot& s = measured_.slots[i];
            const double share = s.expected_at(relative_mse(codec, side, s.head_dim)) / expected;
            s.kld = share * (seen.mean - floor), s.error = share * seen.error;
        }
        work.add(1);
    }
}

// Those of the measurements. Residuals stand on codes: where a layer has none on one side, since the other is measured alone, windows of as
// many tokens in fp16 take their place (of a residual's squared error 1 % is left).
void Planner::set_windows(KvSpec& formats) const {
    formats.windows = windows_;
    if (windows_.residual() && formats.layer_without_residuals()) formats.windows.form = WindowForm::halves;
}

// With the options, windows and scales that hold for all layers.
llama::CacheSpec Planner::spec_of(KvSpec formats) const {
    formats.options() = options_.spec;
    set_windows(formats);
    formats.k_scales = measured_.key_scales;
    return {brief_text(formats), formats};
}

// Beside heads that are measured the others of their layer are as good as exact.
KvSpec Planner::group_spec(const std::vector<std::size_t>& group, CodecId codec) const {
    std::map<std::pair<int, Side>, std::vector<CodecId>> layers;
    for (const std::size_t i : group) {
        const MeasuredSlot& s = measured_.slots[i];
        std::vector<CodecId>& heads = layers[{s.layer, s.side}];
        heads.resize(static_cast<std::size_t>(s.of_heads), CodecId::turbo8);
        if (s.head < 0) std::ranges::fill(heads, codec);
        heads[static_cast<std::size_t>(std::max(0, s.head))] = codec;
    }
    KvSpec spec = uniform_spec(CodecId::raw, CodecId::raw);
    for (const auto& [at, heads] : layers) spec.set(at.second, at.first, HeadCodecs(heads));
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
    std::vector<Plan> contenders{allocate_formats(measured_, bits, n_ctx)};
    if (options_.race) {
        contenders.push_back(allocate_formats(measured_, bits, n_ctx, 1));  // what is expected, alone
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

KldMeter& Planner::race_meter() {
    if (!race_meter_)
        race_meter_ = std::make_unique<KldMeter>(*file_, race_text_, spec_of(uniform_spec(CodecId::raw, CodecId::raw)),
                                                 llama::ContextOptions{.n_threads = options_.n_threads});
    return *race_meter_;
}

Plan Planner::race(std::vector<Plan> contenders) {
    llama::Work work(file_->monitor(), "race", static_cast<double>(contenders.size()));
    struct Runner {
        const Plan* plan;
        const std::vector<double>* kld;
        double mean;
    };
    std::vector<Runner> runners;
    for (const Plan& p : contenders) {
        KvSpec spec = to_spec(p);
        set_windows(spec);
        std::vector<double>& kld = raced_[to_string(spec)];
        if (kld.empty()) kld = race_meter().divergences({brief_text(spec), spec});
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
    set_windows(spec);
    return meter_->measure({brief_text(spec), spec});
}

}  // namespace turboquant::measure
