// The backend (stream) of a device: walks the nodes that the scheduler gave us.
#include <cstring>
#include <exception>

#include "turboquant/ggml/ops.h"
#include "turboquant/ggml/team.h"

namespace turboquant::ggml {
namespace {

struct Backend {
    ggml_backend backend;
    TeamExecutor team;
    OpContext ctx;
};

Backend& backend_of(ggml_backend_t b) { return *static_cast<Backend*>(b->context); }

std::string compute(OpContext& ctx, const ggml_tensor* node) {
    const Ops& ops = ctx.device->ops;
    if (is_view_op(ops, node)) return {};
    if (node->op == ops.set_rows && is_kv(node)) return compute_set_rows(ctx, node);
    if (node->op == ops.flash_attn) return compute_flash_attn(ctx, node);
    if (node->op == ops.rope && is_kv(node)) return compute_rope_shift(ctx, node);
    const std::string why = unservable(*ctx.device, node);
    return why.empty() ? std::string(ggml_op_desc(node)) + " is no operation of a KV cache" : why;
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
    Backend& b = backend_of(backend);
    b.ctx.cache.plans.begin_graph();
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        std::string error;
        try {
            error = compute(b.ctx, ggml_graph_node(graph, i));
        } catch (const std::bad_alloc&) {
            const_cast<Device*>(b.ctx.device)->refuse("out of memory");
            return GGML_STATUS_ALLOC_FAILED;
        } catch (const std::exception& e) {
            error = e.what();
        }
        if (!error.empty()) {
            const_cast<Device*>(b.ctx.device)->refuse(error);
            return GGML_STATUS_FAILED;
        }
    }
    return GGML_STATUS_SUCCESS;
}

ggml_guid_t guid() {
    static ggml_guid id = {0x74, 0x75, 0x72, 0x62, 0x6f, 0x71, 0x75, 0x61, 0x6e, 0x74, 0x2e, 0x63, 0x70, 0x70, 0x00, 0x01};
    return &id;
}

}  // namespace

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char*) {
    auto* b = new Backend{};
    b->ctx.device = &device_of(dev);
    device_of(dev).begin_context();
    b->ctx.cache.store.executor = &b->team;
    b->backend.guid = guid();
    b->backend.device = dev;
    b->backend.context = b;
    ggml_backend_i& i = b->backend.iface;
    i.get_name = [](ggml_backend_t x) { return device_of(x->device).name.c_str(); };
    i.free = [](ggml_backend_t x) { delete &backend_of(x); };
    i.graph_compute = graph_compute;
    return &b->backend;
}

void set_n_threads(ggml_backend_t backend, int n_threads) {
    if (backend->iface.graph_compute == graph_compute) backend_of(backend).team.set_n_threads(n_threads);
}

}  // namespace turboquant::ggml
