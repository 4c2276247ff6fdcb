#include "turboquant/measure/planner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <thread>

#include "fmt/format.h"
#include "turboquant/codec/tile.h"
#include "turboquant/measure/kv_statistics.h"
#include "turboquant/planner/allocate.h"
#include "turboquant/planner/key_balance.h"
#include "turboquant/spec/channel_scales.h"

namespace turboquant::measure {
namespace {

/// Multiplications of all runs together: about a minute on two cores. Fixed, so that the plan does not depend on the machine's speed.
constexpr double kWork = 7e12;
/// What a text shows of single heads depends on the text: a head that a short one hardly needs may be what another one rests on. So many
/// tokens' worth of "as the layer's heads do on average" is put in with what is measured of each (docs/planner.md).
constexpr double kPriorTokens = 512;
constexpr int kSequence = 1024;  // of this length, because errors of keys cost more the longer the context

/// Formats to choose from: those with kernels of their own. Of equal bits, a better one is in the list too (trellis beside scalar): the
/// allocation takes it.
std::vector<CodecId> candidates() {
    std::vector<CodecId> out;
    for (const CodecInfo& c : kCodecs)
        if (!is_composite(c.id)) out.push_back(c.id);
    return out;
}

/// What is measured in a slot: the coarsest format, whose divergence stands out of rounding; where that is beyond the range in which
/// divergence is proportional to the error, finer ones until it is within.
constexpr CodecId kMeasured[] = {CodecId::turbo2, CodecId::turbo4, CodecId::turbo6, CodecId::turbo8};
constexpr double kProportional = 0.1;  // nats

double size_unit(const Slot& s, CodecId codec) { return static_cast<double>(tile_bytes({codec, s.side, s.head_dim})) * s.n_heads; }

}  // namespace

Planner::Planner(llama::ModelFile& file, PlannerOptions options)
    : file_(&file), id_(llama::identify_model(file.path())), options_(std::move(options)) {
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const llama::ModelFile::Loaded plain = file.load(llama::CacheSpec{"f16", std::nullopt});
    n_layers_ = llama_model_n_layer(plain.model.get());
    n_ctx_train_ = llama_model_n_ctx_train(plain.model.get());
    const llama::KvProbe probe(plain.model.get(), kSequence, options_.n_threads);
    probe_ctx_ = probe.n_ctx();
    for (const llama::KvLayerShape& l : probe.layers()) {
        slots_.push_back({l.layer, Side::key, l.k_head_dim, l.k_heads, -1, l.k_heads, l.n_cells, {}, {}});
        if (l.v_heads) slots_.push_back({l.layer, Side::value, l.v_head_dim, l.v_heads, -1, l.v_heads, l.n_cells, {}, {}});
    }
    for (const Slot& s : slots_)
        if (!head_dim_supported(s.head_dim))
            throw llama::Error(fmt::format("layer {} has heads of {}, for which turboquant has no formats", s.layer, s.head_dim));
}

double Planner::n_runs() const { return static_cast<double>(slots_.size() + 9); }

double Planner::affordable_tokens(const llama_model* model) const {
    return kWork / (static_cast<double>(llama_model_n_params(model)) * n_runs());
}

// A slot per KV head.
void Planner::split_heads() {
    std::vector<Slot> layers;
    layers.swap(slots_);
    for (const Slot& l : layers)
        for (int h = 0; h < l.of_heads; h++) {
            slots_.push_back(l);
            slots_.back().n_heads = 1;
            if (l.of_heads > 1) slots_.back().head = h;
        }
}

void Planner::measure_slots() {
    const llama::ModelFile::Loaded plain = file_->load(llama::CacheSpec{"f16", std::nullopt});
    // Heads apart if that leaves two sequences to measure each on: with one, more text for whole layers does as much.
    const std::vector<Slot> layers = slots_;
    split_heads();
    if (!options_.per_head && affordable_tokens(plain.model.get()) < std::max(2 * kSequence, options_.calib_tokens)) slots_ = layers;
    const double runs = n_runs();
    int tokens = options_.calib_tokens;
    if (tokens == 0) tokens = static_cast<int>(std::clamp(affordable_tokens(plain.model.get()), 512.0, 4.0 * kSequence));
    const int length = std::min(kSequence, tokens) / 64 * 64, n_sequences = std::max(1, tokens / length);
    file_->monitor().note(fmt::format(
        "plan: {} layers, {} slots{}, calibration on {} x {} tokens, {}", n_layers_, slots_.size(),
        slots_.size() > layers.size() ? " (per KV head)" : "", n_sequences, length,
        options_.calib_file.empty() ? fmt::format("which the model writes (seed {})", options_.seed) : "from " + options_.calib_file));
    text_ = options_.calib_file.empty()
                ? llama::generate_text(plain.model.get(), n_sequences, length, options_.seed, options_.n_threads, file_->monitor())
                : llama::text_from_file(llama_model_get_vocab(plain.model.get()), options_.calib_file, n_sequences, length);
    llama::Work work(file_->monitor(), "plan", runs);
    meter_ = std::make_unique<KldMeter>(*file_, text_, spec_of(uniform_spec(CodecId::raw, CodecId::raw)),
                                        llama::ContextOptions{.n_threads = options_.n_threads});
    const llama::KvMemory& m = meter_->reference_memory();
    fixed_bits_ = std::max(0.0, m.bits_per_value - 16) * n_values(probe_ctx_) / static_cast<double>(probe_ctx_);
    work.add(1);
    measure_scales(plain.model.get());
    work.add(7);
    const auto measure_slot = [&](const Slot& s, CodecId codec) { return meter_->measure(spec_of(spec_with(s, codec))); };
    // Any difference at all, however small, makes later layers round differently: that much is no error of the format.
    floor_ = measure_slot(slots_.front(), CodecId::turbo8).mean;
    work.add(1);
    for (Slot& s : slots_) {
        for (const CodecId codec : kMeasured) {
            const Divergence d = measure_slot(s, codec);
            s.points.push_back({relative_mse(codec, s.side, s.head_dim), d.mean - floor_});
            s.errors.push_back(d.error);
            if (d.mean < kProportional) break;
        }
        work.add(1);
    }
}

// Scales from what keys and queries of the calibration text look like; kept if they pay when measured.
void Planner::measure_scales(llama_model* model) {
    // Formats to try the scales with: each alone is off by a few percent, about what there may be to gain.
    constexpr CodecId kTried[] = {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4};
    if (!options_.spec.offset) return;
    llama::KvProbe probe(model, static_cast<int>(text_.sequences.at(0).size()), options_.n_threads);
    KvStatistics statistics;
    for (const auto& tokens : text_.sequences) probe.run(tokens, [&](const llama::KvRows& rows) { statistics.add(rows); });
    std::map<int, std::string> scales;
    std::vector<int> layers;
    for (const llama::KvLayerShape& l : probe.layers()) {
        const std::vector<double> variance = statistics.key_variance(l.layer), energy = statistics.query_energy(l.layer);
        const auto d = static_cast<std::size_t>(l.k_head_dim);
        if (!l.rope || l.v_heads == 0 || variance.size() != d * static_cast<std::size_t>(l.k_heads) || energy.size() != variance.size())
            continue;
        std::vector<std::pair<int, int>> pairs;
        for (int i = 0; i < l.rope_params.n_dims / 2; i++) pairs.push_back(rope_pair(l.rope_params, i));
        for (std::size_t head = 0; head < variance.size(); head += d)
            scales[l.layer] += scale_letters(balance_keys(std::span(variance).subspan(head, d), std::span(energy).subspan(head, d), pairs));
        layers.push_back(l.layer);
    }
    if (scales.empty()) return;
    double log_gain = 0;
    for (const CodecId codec : kTried) {
        KvSpec formats = uniform_spec(CodecId::raw, CodecId::raw);
        for (const int layer : layers) formats.set(Side::key, layer, codec);
        key_scales_.clear();
        const double without = meter_->measure(spec_of(formats)).mean;
        key_scales_ = scales;
        log_gain += std::log(meter_->measure(spec_of(formats)).mean / without) / std::size(kTried);
    }
    scale_gain_ = std::exp(log_gain);
    if (!(scale_gain_ < 1)) key_scales_.clear();
}

// With the options and the scales that hold for all layers.
llama::CacheSpec Planner::spec_of(KvSpec formats) const {
    formats.options() = options_.spec;
    formats.k_scales = key_scales_;
    return llama::CacheSpec{brief_text(formats), formats};
}

// Beside a head that is measured alone the others are as good as exact.
KvSpec Planner::spec_with(const Slot& slot, CodecId codec) const {
    std::vector<CodecId> heads(static_cast<std::size_t>(slot.of_heads), slot.head < 0 ? codec : CodecId::turbo8);
    heads[std::max(0, slot.head)] = codec;
    KvSpec spec = uniform_spec(CodecId::raw, CodecId::raw);
    spec.set(slot.side, slot.layer, HeadCodecs(heads));
    return spec;
}

// Cells of a slot in a context: all, or the window that the probe saw.
double Planner::cells(const Slot& s, int n_ctx) const {
    return static_cast<double>(s.n_cells < probe_ctx_ ? std::min<std::int64_t>(s.n_cells, n_ctx) : n_ctx);
}

double Planner::window_bits(int n_ctx) const {
    double bits = 0;
    for (const Slot& s : slots_) {
        const auto n = static_cast<std::int64_t>(cells(s, n_ctx));
        bits += options_.spec.windows.resolve(n).bits(n, static_cast<std::int64_t>(s.head_dim) * s.n_heads);
    }
    return bits;
}

// What is removed from keys, and scales (KvTensor::format_bytes).
double Planner::offset_bits() const {
    double bits = 0;
    for (const Slot& s : slots_)
        if (s.side == Side::key && options_.spec.offset) bits += (16 + 8.0 * key_scales_.contains(s.layer)) * s.head_dim * s.n_heads;
    return bits;
}

double Planner::n_values(int n_ctx) const {
    double n = 0;
    for (const Slot& s : slots_) n += cells(s, n_ctx) * s.head_dim * s.n_heads;
    return n;
}

double Planner::least_bits(int n_ctx) const {
    const std::vector<CodecId> codecs = candidates();
    double bits = 0;
    for (const Slot& s : slots_) {
        double least = HUGE_VAL;
        for (const CodecId c : codecs) least = std::min(least, size_unit(s, c));
        bits += 8 * least * cells(s, n_ctx) / kTileKeys;
    }
    return bits;
}

// Predicted divergence.
double Planner::cost(const Slot& slot, CodecId codec) const {
    double own = 0, all = 0;
    for (const Slot& s : slots_) {
        if (s.layer != slot.layer || s.side != slot.side) continue;
        const double x = CostCurve(s.points, std::max(1e-9, floor_ / 20)).at(relative_mse(codec, s.side, s.head_dim));
        if (s.head == slot.head) own = x;
        all += x;
    }
    if (slot.head < 0) return own;
    const double prior = std::min(1.0, kPriorTokens / static_cast<double>(text_.n_tokens()));
    return (1 - prior) * own + prior * all / slot.of_heads;
}

// Slots that get one format together: each by itself, or all heads of a side of a layer.
std::vector<std::vector<std::size_t>> Planner::groups(bool per_head) const {
    std::vector<std::vector<std::size_t>> out;
    for (std::size_t s = 0; s < slots_.size(); s++) {
        if (per_head || slots_[s].head <= 0) out.emplace_back();
        out.back().push_back(s);
    }
    return out;
}

Plan Planner::plan(const Budget& budget, int n_ctx) {
    if (n_ctx == 0) n_ctx = n_ctx_train_;
    const double values = n_values(n_ctx), wanted = budget.bits > 0 ? budget.bits * values : 8 * budget.bytes;
    const auto check = [&](double least) {
        if (wanted < least)
            throw llama::Error(
                fmt::format("the budget is below the least that this model's cache takes: {:.3f} bits per value, {:.2f} MiB at {} tokens",
                            least / values, least / 8 / (1 << 20), n_ctx));
    };
    check(least_bits(n_ctx));
    if (!meter_) measure_slots();
    const double fixed = fixed_bits_ * n_ctx + window_bits(n_ctx) + offset_bits();
    check(least_bits(n_ctx) + fixed);

    // Sizes in bytes of 64 cells; layers with fewer cells than others weigh less, in 64ths.
    const auto weight = [&](const Slot& s) { return std::max(1.0, std::round(64 * cells(s, n_ctx) / n_ctx)); };
    const double unit_bits = 8.0 * n_ctx / (64.0 * kTileKeys);
    const auto room = static_cast<std::int64_t>((wanted - fixed) / unit_bits + 1e-6);
    // With room for the widest format that mixes in every head, what is left to choose is `raw`, for all heads of a layer or none.
    double all_mixed = 0;
    for (const Slot& s : slots_) all_mixed += size_unit(s, CodecId::turbo8) * weight(s);
    const std::vector<std::vector<std::size_t>> together = groups(static_cast<double>(room) < all_mixed);
    std::vector<std::vector<SlotOption>> options;
    std::vector<std::vector<CodecId>> codecs;
    for (const std::vector<std::size_t>& group : together) {
        options.emplace_back(), codecs.emplace_back();
        for (const CodecId c : candidates()) {
            if (slots_[group.front()].head >= 0 && group.size() == 1 && !mixes(c)) continue;
            SlotOption o;
            for (const std::size_t i : group) {
                const Slot& s = slots_[i];
                o.size += static_cast<std::int64_t>(size_unit(s, c) * weight(s));
                o.cost += cost(s, c);
            }
            options.back().push_back(o), codecs.back().push_back(c);
        }
    }
    const Allocation best = allocate(options, room);
    Plan plan;
    plan.model_hash = id_.hash, plan.model_name = id_.name, plan.n_layers = n_layers_;
    plan.budget = budget.bits > 0 ? budget.bits : 8 * budget.bytes / values;
    plan.bits_per_value = (unit_bits * static_cast<double>(best.size) + fixed) / values;
    plan.predicted_kld = best.cost + floor_;
    plan.calibration = text_.source, plan.calibration_tokens = static_cast<int>(text_.n_tokens());
    plan.options = options_.spec;
    std::map<int, std::array<std::vector<CodecId>, 2>> chosen;
    std::map<int, PlannedLayer> layers;
    for (std::size_t g = 0; g < together.size(); g++) {
        const Slot& s = slots_[together[g].front()];
        const bool key = s.side == Side::key;
        PlannedLayer& l = layers[s.layer];
        l.layer = s.layer;
        (key ? l.k_kld : l.v_kld) += options[g][best.choice[g]].cost;
        chosen[s.layer][key ? 0 : 1].push_back(codecs[g][best.choice[g]]);
    }
    for (auto& [layer, l] : layers) {
        l.k = HeadCodecs(chosen[layer][0]);
        if (!chosen[layer][1].empty()) l.v = HeadCodecs(chosen[layer][1]);
        plan.layers.push_back(l);
    }
    for (PlannedLayer& l : plan.layers)
        if (const auto scales = key_scales_.find(l.layer); scales != key_scales_.end() && codec_info(l.k.of(0)).rotated)
            l.k_scales = scales->second;
    return plan;
}

Divergence Planner::measure(const Plan& plan) {
    const KvSpec spec = to_spec(plan);
    return meter_->measure({brief_text(spec), spec});
}

}  // namespace turboquant::measure
