#include "turboquant/ggml/buffer.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "turboquant/ggml/config.h"
#include "turboquant/ggml/kv_names.h"
#include "turboquant/ggml/team.h"
#include "turboquant/planner/prior.h"

namespace turboquant::ggml {
namespace {

/// The widest format that decide_formats may choose: what is reserved until then.
CodecId widest(double bits) {
    const std::vector<CodecId> codecs = unmeasured_candidates(bits);
    const auto size = [](CodecId c) { return bits_per_value(c, 128); };
    return codecs.empty() ? CodecId::tcq1 : *std::ranges::max_element(codecs, {}, size);
}

KvGeometry geometry_of(const KvSpec& spec, double auto_bits, bool residuals, Side side, const ggml_tensor* t) {
    KvGeometry g;
    g.side = side;
    g.codecs = auto_bits > 0 ? HeadCodecs(widest(auto_bits)) : spec.codecs(side, kv_layer(t->name));
    g.norm_mode = spec.norm(side);
    g.outlier_ratio = spec.outlier_ratio;
    g.n_embd = t->ne[0];
    g.n_cells = t->ne[1];
    g.n_streams = t->ne[2] * t->ne[3];
    g.windows = auto_bits > 0 ? spec.windows.resolve(g.n_cells, residuals) : spec.windows_of(kv_layer(t->name), g.n_cells, residuals);
    return g;
}

KvBuffer& context_of(ggml_backend_buffer_t buffer) { return *static_cast<KvBuffer*>(buffer->context); }

/// Rows that come and go outside of a graph: by as many threads as the device's graphs run on, if it is more than they take to wake up; and
/// on no stream but one that all before has ended for.
struct Transfer {
    static constexpr size_t kWorthThreads = 256 * 1024;  // bytes

    TeamExecutor executor;
    StoreContext ctx{&executor};

    Transfer(const Device& device, size_t size) { executor.set_n_threads(size < kWorthThreads ? 1 : device.n_threads.load()); }
};

/// f(context) touches the cache of a tensor, `size` nominal bytes of it; what it throws is refused, and false returned.
template <class F>
bool apart(ggml_backend_buffer_t buffer, const ggml_tensor* t, size_t size, F&& f) {
    try {
        KvBuffer& b = context_of(buffer);
        const std::scoped_lock lock(b.apart);
        Transfer run(b.device(), size);
        run.ctx.device = std::move(b.apart_device);
        b.memory().synchronize();
        f(run.ctx);
        b.memory().synchronize();
        b.apart_device = std::move(run.ctx.device);
        return true;
    } catch (const std::exception& e) {
        context_of(buffer).device().refuse(std::string("'") + root(t)->name + "': " + e.what());
        return false;
    }
}

void get_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* t, void* data, size_t offset, size_t size) {
    KvExtra* e = kv_extra(t);
    if (!e) return context_of(buffer).memory().get(t, data, offset, size);
    if (e->bound()) {
        context_of(buffer).note_saved();
        if (apart(buffer, t, size, [&](StoreContext& ctx) { e->layer->save(ctx, e->side, t->view_offs + offset, size, data); })) return;
    }
    std::memset(data, 0, size);  // nothing was written yet, or nothing is to be had
}

void set_tensor(ggml_backend_buffer_t buffer, ggml_tensor* t, const void* data, size_t offset, size_t size) {
    KvExtra* e = kv_extra(t);
    if (!e) return context_of(buffer).set_plain(t, data, offset, size);
    if (!e->bound()) {
        // llama.cpp reserves its graphs, and so shows us the head size, before it restores anything.
        if (e->refused.empty()) e->refused = "a state was restored before its head size was known";
        context_of(buffer).device().refuse(std::string("cannot restore ") + root(t)->name + ": " + e->refused);
        return;
    }
    apart(buffer, t, size, [&](StoreContext& ctx) {
        e->written = true;
        const RestoreResult result = e->layer->restore(ctx, e->side, t->view_offs + offset, size, data);
        context_of(buffer).report_lost(t, result);
    });
}

void memset_tensor(ggml_backend_buffer_t buffer, ggml_tensor* t, uint8_t value, size_t offset, size_t size) {
    if (!kv_extra(t)) return context_of(buffer).memory().fill(t, value, offset, size);
    const std::vector<char> bytes(size, static_cast<char>(value));
    set_tensor(buffer, t, bytes.data(), offset, size);
}

/// Copies between whole streams of KV tensors of one geometry (sequence copy between streams); for all else ggml goes through get and set.
bool cpy_tensor(ggml_backend_buffer_t buffer, const ggml_tensor* src, ggml_tensor* dst) {
    KvExtra *s = kv_extra(src), *d = kv_extra(dst);
    if (!s && !d) return context_of(buffer).copy_plain(src, dst);
    if (!s || s != d || !s->bound()) return false;
    const std::size_t stream_bytes = root(src)->nb[2];
    if (ggml_nbytes(src) != stream_bytes || ggml_nbytes(dst) != stream_bytes || src->view_offs % stream_bytes ||
        dst->view_offs % stream_bytes)
        return false;
    const auto from = static_cast<std::int64_t>(src->view_offs / stream_bytes),
               to = static_cast<std::int64_t>(dst->view_offs / stream_bytes);
    apart(buffer, dst, stream_bytes, [&](StoreContext& ctx) { s->layer->copy_stream(ctx, s->side, from, to); });
    return true;
}

ggml_backend_buffer_i buffer_interface() {
    ggml_backend_buffer_i i{};
    i.free_buffer = [](ggml_backend_buffer_t b) { delete &context_of(b); };
    i.get_base = [](ggml_backend_buffer_t b) -> void* { return context_of(b).base(); };
    i.init_tensor = [](ggml_backend_buffer_t b, ggml_tensor* t) {
        return context_of(b).init_tensor(t) ? GGML_STATUS_SUCCESS : GGML_STATUS_FAILED;
    };
    i.memset_tensor = memset_tensor;
    i.set_tensor = set_tensor;
    i.get_tensor = get_tensor;
    i.cpy_tensor = cpy_tensor;
    i.clear = [](ggml_backend_buffer_t b, uint8_t value) { context_of(b).clear(value); };
    return i;
}

}  // namespace

bool is_layer_state(const ggml_tensor* t) {
    const std::string_view name = t->name;
    const std::size_t l = name.rfind("_l");
    return l != name.npos && l > 0 && l + 2 < name.size() && name.find('.') == name.npos &&
           name.find_first_not_of("0123456789", l + 2) == name.npos;
}

bool is_ours(const ggml_tensor* t) {
    const ggml_backend_buffer* buffer = root(t)->buffer;
    return buffer && buffer->buft && buffer->buft->iface.alloc_buffer == alloc_buffer;
}

bool is_kv(const ggml_tensor* t) {
    if (!is_ours(t) || !kv_side(root(t))) return false;
    const ggml_backend_buffer* buffer = root(t)->buffer;  // llama.cpp measures with empty ones, which have no context
    return !(buffer->context ? static_cast<const KvBuffer*>(buffer->context)->plain_caches() : device_of(buffer->buft).plain_caches);
}

std::optional<Side> kv_side(const ggml_tensor* t) {
    const auto name = parse_kv_name(t->name);
    return name ? std::optional(name->side) : std::nullopt;
}

bool is_foreign_cache(const ggml_tensor* t) { return t && root(t)->buffer && root(t)->buffer->size > 0 && !is_ours(t) && kv_side(root(t)); }

int kv_layer(const std::string& name) {
    const auto parsed = parse_kv_name(name);
    return parsed ? parsed->layer : -1;
}

// Nothing but a KV tensor has an extra in our buffers: no name to compare, since this is asked of every tensor of every graph.
KvExtra* kv_extra(const ggml_tensor* t) { return root(t)->extra && is_ours(t) ? static_cast<KvExtra*>(root(t)->extra) : nullptr; }

const void* on_host(const ggml_tensor* t, std::vector<std::uint8_t>& memory) {
    const ggml_backend_buffer* buffer = root(t)->buffer;
    if (!buffer || ggml_backend_buffer_is_host(const_cast<ggml_backend_buffer*>(buffer))) return t->data;
    if (is_ours(t)) {
        KvBuffer& ours = *static_cast<KvBuffer*>(buffer->context);
        if (ours.device().on_host()) return t->data;
        if (const void* known = ours.inputs().find(root(t))) return static_cast<const char*>(known) + t->view_offs;
        ours.memory().synchronize();
    }
    memory.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, memory.data(), 0, memory.size());
    return memory.data();
}

bool is_there(const ggml_tensor* t) {
    return is_ours(t) && root(t)->buffer && static_cast<KvBuffer*>(root(t)->buffer->context)->inputs().is_there(root(t));
}

size_t alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor* t) {
    const auto side = kv_side(t);
    Device& device = device_of(buft);
    if (!side || t->view_src || t->type != GGML_TYPE_F16 || device.plain_caches) return device.inner().alloc_size(t);
    const size_t reserved = reserved_bytes(geometry_of(device.spec, device.auto_bits, device.inner().takes_residuals(), *side, t));
    // --fit sizes tensors that have a buffer already, an empty one. A budget holds on average over the tensors; which of them gets more is
    // not known before all layers are.
    if (!t->buffer) {
        take_unservable();  // of a graph before this cache
        return reserved;
    }
    device.fitting = true;
    return device.auto_bits > 0 ? std::min(reserved, static_cast<size_t>(static_cast<double>(ggml_nelements(t)) * device.auto_bits / 8))
                                : reserved;
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    Device& device = device_of(buft);
    if (const std::string why = take_unservable(); !why.empty()) {
        // Memory for a graph. llama.cpp reserves it before it hands out a context, and no other answer makes that fail.
        device.refuse(why);
        return nullptr;
    }
    try {
        return ggml_backend_buffer_init(buft, buffer_interface(), new KvBuffer(device, size), size);
    } catch (const std::bad_alloc&) {
        device.refuse("cannot reserve " + std::to_string(size >> 20) + " MiB for the KV cache; ask for a smaller context");
        return nullptr;
    } catch (const std::exception& e) {
        device.refuse(e.what());
        return nullptr;
    }
}

KvBuffer::KvBuffer(Device& device, size_t size)
    : DeviceBuffer(device.context()),
      device_(device),
      spec_(device.spec),
      auto_bits_(device.auto_bits),
      plain_caches_(device.plain_caches),
      memory_(device.inner().new_memory(size)) {
    device_.add(this);
}

KvBuffer::~KvBuffer() { device_.remove(this); }

void KvBuffer::set_plain(ggml_tensor* t, const void* data, size_t offset, size_t size) {
    memory_->set(t, data, offset, size);
    if (!device_.on_host()) inputs_.set(t, data, offset, size);
}

bool KvBuffer::copy_plain(const ggml_tensor* src, ggml_tensor* dst) {
    inputs_.forget(dst);
    const ggml_backend_buffer* from = root(src)->buffer;
    if (!from || from->buft->iface.alloc_buffer != alloc_buffer) return false;
    return device_of(from->buft).gpu == device_.gpu && memory_->copy(static_cast<KvBuffer*>(from->context)->memory(), src, dst);
}

bool KvBuffer::init_tensor(ggml_tensor* t) {
    if (plain_caches_ || !kv_side(t)) memory_->init_tensor(t);
    if (t->view_src || !is_layer_state(t)) return true;
    const auto side = plain_caches_ ? std::nullopt : kv_side(t);
    if (!side) {
        const std::string_view name = t->name;
        const std::scoped_lock lock(lists_);
        plain_[std::string(name.substr(0, name.rfind("_l")))] += ggml_nbytes(t);
        return true;
    }
    if (t->type != GGML_TYPE_F16) {
        device_.refuse(std::string("'") + t->name + "' is asked for as " + ggml_type_name(t->type) +
                       ": leave -ctk and -ctv at f16, the device sets the format; or take llama.cpp's own " + ggml_type_name(t->type) +
                       " cache with -dev none");
        return false;
    }
    const KvGeometry g = geometry_of(spec_, auto_bits_, device_.inner().takes_residuals(), *side, t);
    std::string name = t->name;
    name[name.rfind("_l") - 1] = 'k';
    const std::scoped_lock lock(lists_);
    auto& layer = layers_[name];
    if (!layer) layer = std::make_unique<LayerCache>(cells_for(g));
    auto e = std::make_unique<KvExtra>(KvExtra{layer.get(), *side, static_cast<std::uint8_t*>(t->data)});
    layer->set_tensor(g, device_.inner().store_in(e->memory));
    t->extra = e.get();
    tensors_.push_back(std::move(e));
    names_.emplace_back(t->name);
    return true;
}

CellPositions& KvBuffer::cells_for(const KvGeometry& g) {
    for (const auto& c : cells_)
        if (c->n_cells() == g.n_cells && c->size() == static_cast<std::size_t>(g.n_cells * g.n_streams)) return *c;
    cells_.push_back(std::make_unique<CellPositions>(g.n_cells, g.n_streams));
    cells_.back()->limit_offsets(device_.inner().most_offsets());
    return *cells_.back();
}

std::set<std::pair<int, Side>> KvBuffer::slots() const {
    const std::scoped_lock lock(lists_);
    std::set<std::pair<int, Side>> all;
    for (std::size_t i = 0; i < names_.size(); i++) all.insert({kv_layer(names_[i]), tensors_[i]->side});
    return all;
}

void KvBuffer::decide_formats(int head_dim) {
    if (decided_) return;
    decided_ = true;
    try {
        if (device_.plan) check_slots(*device_.plan, device_.slots());
        if (auto_bits_ > 0) choose_formats(head_dim);
    } catch (const std::invalid_argument& e) {
        for (const auto& t : tensors_) t->refused = e.what() + std::string(device_.plan ? kPlanRemedy : "");
    }
}

void KvBuffer::report_lost(const ggml_tensor* t, RestoreResult why) {
    if (why == RestoreResult::ok || !reported_.insert(why).second) return;
    const std::string text =
        why == RestoreResult::damaged ? "the saved state is damaged: restore another copy, or process the prompt again"
        : why == RestoreResult::scales_differ
            ? "the state was saved with a plan that scales key channels: restore it with the same plan, or process the prompt again"
            : "the state was saved with key offset removal, which is off here, or holds too few rows to tell the offset: process "
              "the prompt again";
    device_.refuse(std::string("cannot restore all of ") + root(t)->name + ": " + text +
                   ". Tokens that did not come back count as not written; nothing else is affected");
}

void KvBuffer::note_saved() {
    if (std::exchange(saved_told_, true)) return;
    log_info(device_.name +
             ": saved state (slots, prompt cache) is as large as f16's, for llama.cpp fixes its size; files compress (zstd -1) to little "
             "more than the cache takes");
}

void KvBuffer::announce() {
    if (announced_ || !std::ranges::all_of(tensors_, [](const auto& e) { return e->refused.empty() && e->bound(); })) return;
    announced_ = true;
    turboquant_kv_stats s{};
    double values = 0;
    std::set<int> layers;
    for (const auto& [layer, side] : slots()) layers.insert(layer);
    add_stats(s, values);
    char size[160];
    std::snprintf(size, sizeof size, ": KV cache of %zu layers, %lld cells: %.2f MiB, %.3f bits a value (f16: %.2f MiB); ", layers.size(),
                  static_cast<long long>(cells_.front()->size()), static_cast<double>(s.format_bytes) / (1 << 20),
                  8.0 * static_cast<double>(s.format_bytes) / values, 2 * values / (1 << 20));
    log_warning(device_.name + (device_.gpu ? " on " + device_.gpu->name() : "") + size + device_.formats() + ", exact " +
                to_string(windows()));
}

void KvBuffer::log_plain() {
    std::string text;
    size_t bytes = 0;
    for (const auto& [name, n] : plain_) text += (text.empty() ? "" : ", ") + name, bytes += n;
    char size[32];
    std::snprintf(size, sizeof size, " (%.2f MiB)", static_cast<double>(bytes) / (1 << 20));
    log_info(device_.name + ": state of layers that is no KV cache is not compressed: " + text + size);
}

void KvBuffer::clear(std::uint8_t value) {
    if (!plain_.empty() && !plain_caches_ && !std::exchange(plain_told_, true)) log_plain();  // llama.cpp clears a new cache
    memory_->synchronize();
    // Zero tiles decode to zero vectors. Buffers of weights and of intermediate results may be filled with anything.
    tensors_.empty() ? memory_->fill_all(value) : memory_->clear();
    for (const auto& c : cells_) c->clear();
    for (const auto& [name, layer] : layers_) layer->clear();
}

WindowSizes KvBuffer::windows() const {
    const std::scoped_lock lock(lists_);
    const KvGeometry* largest = nullptr;
    for (const auto& e : tensors_) {
        const KvGeometry& g = e->kv().geometry();
        if (!largest || std::pair(g.n_cells, g.windows.any()) > std::pair(largest->n_cells, largest->windows.any())) largest = &g;
    }
    return largest ? largest->windows : WindowSizes{};
}

void KvBuffer::add_stats(turboquant_kv_stats& s, double& values) const {
    const std::scoped_lock lock(lists_);
    for (const auto& e : tensors_) {
        const KvGeometry& g = e->kv().geometry();
        const std::size_t reserved = reserved_bytes(g);
        s.n_tensors++;
        s.reserved_bytes += reserved + e->kv().offset_bytes();
        s.format_bytes += e->kv().format_bytes();
        values += static_cast<double>(g.n_embd) * static_cast<double>(g.n_cells * g.n_streams);
        s.touched_bytes += memory_->touched(e->memory, reserved);
        if (e->kv().exact()) s.touched_bytes += e->kv().exact()->bytes();
    }
    for (const auto& c : cells_) s.format_bytes += c->bytes(), s.reserved_bytes += c->bytes(), s.touched_bytes += c->bytes();
}

}  // namespace turboquant::ggml
