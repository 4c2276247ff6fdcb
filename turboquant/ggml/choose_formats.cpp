// The formats of a cache that were left to us (auto:B), when its layers are known.
#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

#include "turboquant/ggml/buffer.h"
#include "turboquant/planner/prior.h"
#include "turboquant/spec/words.h"

namespace turboquant::ggml {

CacheShape KvBuffer::cache_shape() const {
    const std::scoped_lock lock(lists_);
    CacheShape out;
    for (std::size_t i = 0; i < tensors_.size(); i++) {
        const KvGeometry& g = tensors_[i]->kv().geometry();
        out.sides.push_back({kv_layer(names_[i]), g.side, g.n_embd, g.n_cells * g.n_streams});
        out.fixed_bits += g.windows.bits(g.n_cells, g.n_embd, kHeadDims[0]) * static_cast<double>(g.n_streams);
        if (g.side == Side::key && spec_.offset) out.fixed_bits += 16.0 * static_cast<double>(g.n_embd * g.n_streams);  // mu, fp16
    }
    for (const auto& c : cells_) out.fixed_bits += 8.0 * static_cast<double>(c->bytes());
    return out;
}

// Every cache of a context chooses for all of them, and takes what is its own.
void KvBuffer::choose_formats(int head_dim) {
    const CacheShape all = device_.of_context(*this, head_dim);
    std::vector<std::size_t> order(all.sides.size());
    std::iota(order.begin(), order.end(), 0u);
    std::ranges::stable_sort(order, {}, [&](std::size_t i) { return all.sides[i].layer; });
    std::vector<UnmeasuredSlot> slots;
    double values = 0;
    for (const std::size_t i : order) {
        const CacheSide& s = all.sides[i];
        if (s.n_embd % head_dim != 0)
            throw std::invalid_argument("auto: layers with heads of different sizes; name the formats, or a plan");
        slots.push_back({s.side, head_dim, static_cast<int>(s.n_embd / head_dim), s.n_cells});
        values += static_cast<double>(s.n_embd * s.n_cells);
    }
    std::vector<CodecId> formats(order.size());
    const std::vector<CodecId> by_layer = unmeasured_formats(slots, auto_bits_ - all.fixed_bits / values, spec_.offset);
    for (std::size_t i = 0; i < order.size(); i++) formats[order[i]] = by_layer[i];
    for (std::size_t i = 0; i < tensors_.size(); i++) {
        KvGeometry g = tensors_[i]->kv().geometry();
        g.codecs = formats[i];
        const std::scoped_lock lock(lists_);
        tensors_[i]->layer->set_tensor(g, device_.inner().store_in(tensors_[i]->memory));
    }
    Plan plan;
    std::map<int, PlannedLayer> layers;
    for (std::size_t i = 0; i < all.sides.size(); i++) {
        PlannedLayer& l = layers[all.sides[i].layer];
        l.layer = all.sides[i].layer;
        if (all.sides[i].side == Side::key)
            l.k = formats[i];
        else
            l.v = formats[i];
    }
    for (const auto& [number, layer] : layers) plan.layers.push_back(layer);
    device_.note_choice(auto_name(auto_bits_) + " without measurements: " + to_string(to_spec(plan)) +
                        "; `turboquant plan` measures the model and does better");
}

}  // namespace turboquant::ggml
