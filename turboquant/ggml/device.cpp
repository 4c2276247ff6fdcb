#include "turboquant/ggml/device.h"

#include <algorithm>
#include <utility>

#include "turboquant/ggml/cpu_device.h"

namespace turboquant::ggml {

Device::Device(ggml_backend_reg_t reg, const Interfaces& interfaces, const Ops& o, std::string n, const KvSpec& s, const InnerDevice* g)
    : ops(o),
      gpu(g),
      name(std::move(n)),
      description("TurboQuant KV cache, " + brief_text(s) + (g ? " on " + g->name() : "")),
      buft_name(name),
      word(brief_text(s)),
      spec(s) {
    device = {interfaces.device, reg, this};
    buft = {interfaces.buft, &device, this};
}

namespace {
thread_local std::string unservable_graph;
}

void note_unservable(std::string why) {
    if (unservable_graph.empty()) unservable_graph = std::move(why);
}

std::string take_unservable() { return std::exchange(unservable_graph, {}); }

void Device::refuse(const std::string& text) {
    const std::scoped_lock lock(mutex_);
    last_error_ = text;
    log_error(text);
}

std::string Device::last_error() const {
    const std::scoped_lock lock(mutex_);
    return last_error_;
}

void Device::note_choice(const std::string& text) {
    const std::scoped_lock lock(mutex_);
    if (choice_ == text) return;  // said by another cache of the context
    choice_ = text;
    log_info(text);
}

std::string Device::formats() const {
    const std::scoped_lock lock(mutex_);
    if (auto_bits > 0) return choice_.empty() ? description : choice_;
    return "keys " + std::string(codec_info(spec.k).name) + ", values " + std::string(codec_info(spec.v).name) +
           (plan || !spec.k_scales.empty() ? ", plan " + brief_text(spec) : "");
}

std::string Device::windows() const {
    const std::scoped_lock lock(mutex_);
    std::string text;
    for (const DeviceBuffer* b : buffers_)
        if (const std::string w = to_string(b->windows()); !w.empty()) text = "exact " + w;
    return text;
}

std::set<std::pair<int, Side>> Device::slots() const {
    const std::scoped_lock lock(mutex_);
    std::set<std::pair<int, Side>> all;
    for (const DeviceBuffer* b : buffers_) all.merge(b->slots());
    return all;
}

void Device::begin_context() {
    const std::scoped_lock lock(mutex_);
    fitting = false;
    context_++;
    take_unservable();
    placement_.begin();
    // Such a context asks a GPU next to nothing. (On the CPU its operations are seen, and whether it has a cache at all.)
    if (!on_host() && !has_layers) log_warning(name + ": " + placement_.none_here());
}

int Device::context() const {
    const std::scoped_lock lock(mutex_);
    return context_;
}

CacheShape Device::of_context(const DeviceBuffer& mine, int head_dim) const {
    const std::scoped_lock lock(mutex_);
    CacheShape all = mine.cache_shape();
    std::set<int> layers;
    for (const CacheSide& s : all.sides) layers.insert(s.layer);
    for (const DeviceBuffer* b : buffers_) {
        if (b == &mine || b->context() != mine.context()) continue;
        const CacheShape other = b->cache_shape();
        // Layers are in one cache only: another that has them, too, is another model's.
        if (std::ranges::any_of(other.sides, [&](const CacheSide& s) { return layers.contains(s.layer) || s.n_embd % head_dim != 0; }))
            continue;
        for (const CacheSide& s : other.sides) layers.insert(s.layer);
        all.sides.insert(all.sides.end(), other.sides.begin(), other.sides.end());
        all.fixed_bits += other.fixed_bits;
    }
    return all;
}

void Device::see_foreign_cache(const ggml_tensor* tensor) {
    std::set<int> ours;
    for (const auto& [layer, side] : slots()) ours.insert(layer);
    const std::scoped_lock lock(mutex_);
    if (const std::string warning = placement_.see(tensor, ours); !warning.empty()) log_warning(name + ": " + warning);
}

void Device::add(DeviceBuffer* b) {
    const std::scoped_lock lock(mutex_);
    buffers_.push_back(b);
}

void Device::remove(DeviceBuffer* b) {
    const std::scoped_lock lock(mutex_);
    std::erase(buffers_, b);
}

turboquant_kv_stats Device::stats() const {
    const std::scoped_lock lock(mutex_);
    turboquant_kv_stats s{};
    double values = 0;
    for (const DeviceBuffer* b : buffers_) b->add_stats(s, values);
    s.f16_bytes = 2 * values;
    s.bits_per_value = values > 0 && s.format_bytes ? 8.0 * static_cast<double>(s.format_bytes) / values : 0;
    return s;
}

const InnerDevice& Device::inner() const { return gpu ? *gpu : cpu_device(ops); }

bool Device::takes_all() const {
    if (has_layers) return true;
    const std::scoped_lock lock(mutex_);
    return std::ranges::any_of(buffers_, [](const DeviceBuffer* b) { return b->has_state(); });
}

}  // namespace turboquant::ggml
