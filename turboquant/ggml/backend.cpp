#include "turboquant/ggml/backend.h"

#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <optional>

#include "turboquant/ggml/decoded_sources.h"
#include "turboquant/ggml/inner_device.h"
#include "turboquant/ggml/ops.h"

namespace turboquant::ggml {
namespace {

struct Backend {
    ggml_backend backend;
    std::unique_ptr<InnerBackend> inner;
    OpContext ctx;
    DecodedSources decoded;
    ggml_backend_event_t awaited = nullptr;  ///< by this stream, for the graph to come
    std::vector<int> own;                    ///< nodes of the run at hand that the wrapped device cannot compute
    ggml_status failure = GGML_STATUS_SUCCESS;

    /// Records why an operation failed; false.
    bool fail(ggml_status status, const std::string& text) {
        failure = status;
        ctx.device->refuse(text);
        return false;
    }
};

Backend& backend_of(ggml_backend_t b) { return *static_cast<Backend*>(b->context); }

/// How a node has to do with compressed rows.
enum class Access { none, own, reads, writes };

Access access_of(const Ops& ops, const ggml_tensor* node) {
    if (is_view_op(ops, node)) return Access::none;
    if (kv_extra(node)) return node->op == ops.set_rows || node->op == ops.rope ? Access::own : Access::writes;
    if (node->op == ops.flash_attn && (kv_extra(node->src[1]) || kv_extra(node->src[2])))
        return attends_compressed(node) ? Access::own : Access::reads;
    for (const ggml_tensor* src : node->src)
        if (src && kv_extra(src)) return Access::reads;
    return Access::none;
}

std::string compute(OpContext& ctx, const ggml_tensor* node) {
    const Ops& ops = ctx.device->ops;
    if (node->op == ops.set_rows) return compute_set_rows(ctx, node);
    if (node->op == ops.flash_attn) return compute_flash_attn(ctx, node);
    return compute_rope_shift(ctx, node);
}

/// f() returns why it failed, or throws.
template <class F>
bool guarded(Backend& b, F&& f) {
    try {
        const std::string error = f();
        return error.empty() || b.fail(GGML_STATUS_FAILED, error);
    } catch (const std::bad_alloc&) {
        return b.fail(GGML_STATUS_ALLOC_FAILED, "out of memory");
    } catch (const std::exception& e) {
        return b.fail(GGML_STATUS_FAILED, e.what());
    }
}

ggml_status run(Backend& b, ggml_cgraph* graph, int first, int end) {
    if (first == end) return GGML_STATUS_SUCCESS;
    const ggml_status status = b.inner->compute(graph, first, end, b.own, [&b](const ggml_tensor* node, Executor& executor) {
        b.ctx.cache.store.executor = &executor;
        return guarded(b, [&] { return compute(b.ctx, node); });
    });
    b.own.clear();
    b.ctx.cache.store.executor = &b.inner->executor();  // that of a node is gone with it
    return b.failure != GGML_STATUS_SUCCESS ? b.failure : status;
}

/// A node of a graph, exchanged as long as this lives.
class Exchanged {
  public:
    Exchanged(ggml_tensor*& node, ggml_tensor* by) : node_(node), original_(node) { node = by; }
    ~Exchanged() { node_ = original_; }
    Exchanged(const Exchanged&) = delete;

  private:
    ggml_tensor*& node_;
    ggml_tensor* original_;
};

ggml_status compute_graph(Backend& b, ggml_cgraph* graph) {
    const int n = ggml_graph_n_nodes(graph);
    ggml_tensor** nodes = ggml_graph_nodes(graph);
    int first = 0;
    std::optional<Exchanged> decoded;  // nodes[first], if it reads compressed rows
    for (int i = 0; i <= n; i++) {
        const Access access = i == n ? Access::none : access_of(b.ctx.device->ops, nodes[i]);
        if (access == Access::own) b.own.push_back(i);
        if (i < n && (access == Access::own || access == Access::none)) continue;
        // All before it, then what it reads can be decoded.
        const ggml_status status = run(b, graph, first, i);
        decoded.reset();
        first = i;
        if (i == n || status != GGML_STATUS_SUCCESS) return status;
        if (access == Access::writes) {
            b.fail(GGML_STATUS_FAILED, unservable(*b.ctx.device, nodes[i]));
            return GGML_STATUS_FAILED;
        }
        b.inner->synchronize();  // a node before, or a graph before, may still read where the rows are put
        if (!guarded(b, [&] { return b.decoded.decode(*b.ctx.device, b.ctx.cache.store, nodes[i]); })) return b.failure;
        decoded.emplace(nodes[i], b.decoded.node());
    }
    return GGML_STATUS_SUCCESS;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
    Backend& b = backend_of(backend);
    take_unservable();  // of a graph that needed no new memory: it fails here, and the next one is not held against it
    b.ctx.cache.plans.begin_graph();
    ggml_status status = GGML_STATUS_SUCCESS;
    b.failure = GGML_STATUS_SUCCESS;
    b.own.clear();
    b.awaited = nullptr;
    if (const std::string late = b.inner->late_error(); !late.empty()) {
        b.fail(GGML_STATUS_FAILED, late);
        return b.failure;
    }
    const auto all = [&] {
        status = compute_graph(b, graph);
        return std::string();
    };
    return guarded(b, all) ? status : b.failure;
}

/// Rows that are kept stay where the model made them until attention over their cache is through, which reads them there
/// (cache/cuda/cuda_attend.cpp). Without it their memory may be the result's, and attention reads what was kept instead.
void keep_rows_allocated(ggml_backend_t backend, ggml_cgraph* graph, ggml_backend_graph_optimize_params* params) {
    const Ops& ops = device_of(backend->device).ops;
    std::map<const ggml_tensor*, const ggml_tensor*> rows;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor* node = ggml_graph_node(graph, i);
        if (node->op == ops.set_rows) rows[root(node)] = root(node->src[0]);
        if (node->op != ops.flash_attn) continue;
        for (const int side : {1, 2})
            if (const auto found = rows.find(root(node->src[side])); found != rows.end())
                params->add_alloc_dep(params->user_data, const_cast<ggml_tensor*>(found->second), node);
    }
}

KvBuffer& buffer_of(const ggml_tensor* t) { return *static_cast<KvBuffer*>(root(t)->buffer->context); }

/// A tensor as the wrapped device's stream takes it; none if it is compressed.
std::optional<ggml_tensor> as_wrapped(const ggml_tensor* t) {
    if (!is_ours(t)) return *t;
    if (kv_extra(t)) return {};
    return buffer_of(t).memory().as_wrapped(t);
}

/// As that, for transfers by the stream of a backend: none either if the tensor is elsewhere.
std::optional<ggml_tensor> on_stream(const Backend& b, const ggml_tensor* t) {
    return is_ours(t) && device_of(root(t)->buffer->buft).gpu == b.ctx.device->gpu ? as_wrapped(t) : std::nullopt;
}

/// So that llama.cpp prepares the next batch of a prompt while this one's logits are not there yet.
void get_tensor_async(ggml_backend_t backend, const ggml_tensor* t, void* data, std::size_t offset, std::size_t size) {
    Backend& b = backend_of(backend);
    if (const auto wrapped = on_stream(b, t)) return ggml_backend_tensor_get_async(b.inner->stream(), &*wrapped, data, offset, size);
    b.inner->synchronize();
    ggml_backend_tensor_get(t, data, offset, size);
}

/// Weights: all of them while a model is loaded, or the experts that a batch takes. What the host wants to know of a graph's inputs is set at
/// once, as it must be there before the graph is (is_there).
void set_tensor_async(ggml_backend_t backend, ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) {
    Backend& b = backend_of(backend);
    auto wrapped = InputCopies::keeps(root(t)) ? std::nullopt : on_stream(b, t);
    if (wrapped) return ggml_backend_tensor_set_async(b.inner->stream(), &*wrapped, data, offset, size);
    b.inner->synchronize();
    ggml_backend_tensor_set(t, data, offset, size);
}

/// Between GPUs, or on one: after what the source's stream was given, which does it, and before what this one is given from now on. False: it
/// is nothing for these streams, so the scheduler waits for both and copies.
bool cpy_tensor_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor* src, ggml_tensor* dst) {
    Backend& b = backend_of(to);
    const bool ours = from->iface.graph_compute == graph_compute;
    const ggml_backend_t stream = b.inner->stream(), source = ours ? backend_of(from).inner->stream() : from;
    const auto s = as_wrapped(src);
    auto d = on_stream(b, dst);
    const auto copy = stream->iface.cpy_tensor_async;
    if (!copy || !source || source->iface.cpy_tensor_async != copy || !s || !d) return false;
    // Who reads what is overwritten was waited for by this stream only (ggml_backend_sched_compute_splits).
    if (b.awaited && source != stream) ggml_backend_event_wait(source, b.awaited);
    if (!copy(source, stream, &*s, &*d)) return false;
    buffer_of(dst).inputs().forget(dst);
    return true;
}

/// compute() leaves the wrapped stream behind all that it gave to others, and begins behind it: an event of that stream is one of all.
void event_record(ggml_backend_t backend, ggml_backend_event_t event) {
    ggml_backend_event_record(event, backend_of(backend).inner->stream());
}

void event_wait(ggml_backend_t backend, ggml_backend_event_t event) {
    Backend& b = backend_of(backend);
    ggml_backend_event_wait(b.inner->stream(), event);
    b.awaited = event;
}

ggml_guid_t guid() {
    static ggml_guid id = {0x74, 0x75, 0x72, 0x62, 0x6f, 0x71, 0x75, 0x61, 0x6e, 0x74, 0x2e, 0x63, 0x70, 0x70, 0x00, 0x01};
    return &id;
}

}  // namespace

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char*) {
    Device& device = device_of(dev);
    try {
        auto b = std::make_unique<Backend>();
        b->inner = device.inner().new_backend();
        b->ctx.device = &device;
        device.begin_context();
        b->ctx.cache.store.executor = &b->inner->executor();
        b->ctx.cache.store.device = b->inner->store_device();
        b->backend.guid = guid();
        b->backend.device = dev;
        b->backend.context = b.get();
        ggml_backend_i& i = b->backend.iface;
        i.get_name = [](ggml_backend_t x) { return device_of(x->device).name.c_str(); };
        i.free = [](ggml_backend_t x) { delete &backend_of(x); };
        i.graph_compute = graph_compute;
        if (!device.on_host()) {
            i.synchronize = [](ggml_backend_t x) { backend_of(x).inner->synchronize(); };
            i.get_tensor_async = get_tensor_async, i.set_tensor_async = set_tensor_async, i.cpy_tensor_async = cpy_tensor_async;
            i.event_record = event_record, i.event_wait = event_wait;
        }
        if (!device.on_host() && is_ggml_0_25())
            i.graph_optimize = reinterpret_cast<void (*)()>(static_cast<graph_optimize_025>(keep_rows_allocated));
        return &b.release()->backend;
    } catch (const std::exception& e) {
        device.refuse(e.what());
        return nullptr;
    }
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
    if (backend->iface.graph_compute != graph_compute) return;
    backend_of(backend).inner->set_n_threads(n_threads);
    device_of(backend->device).n_threads = std::max(1, n_threads);
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data) {
    if (backend->iface.graph_compute == graph_compute) backend_of(backend).inner->set_abort_callback(callback, data);
}

}  // namespace turboquant::ggml
