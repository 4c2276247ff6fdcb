#include "turboquant/ggml/device_interface.h"

#include "turboquant/ggml/backend.h"
#include "turboquant/ggml/buffer.h"
#include "turboquant/ggml/graph_walk.h"
#include "turboquant/ggml/host_memory.h"
#include "turboquant/ggml/ops.h"

namespace turboquant::ggml {
namespace {

/// What the kernel says is available; but while --fit weighs a context, all of the memory, because that is what it takes the CPU to have
/// (ggml's CPU device reports its total as free). This device's cache lies in the same memory: anything less would make --fit shrink the
/// context, or move layers to the "larger" CPU and so to f16, where without a device it changes nothing.
void get_memory(ggml_backend_dev_t dev, size_t* free, size_t* total) {
    if (const InnerDevice* gpu = device_of(dev).gpu) return ggml_backend_dev_memory(gpu->wrapped(), free, total);
    const HostMemory m = host_memory();
    *total = m.total;
    *free = device_of(dev).fitting ? m.total : m.available;
}

// One id for all: llama.cpp takes the first device of an id and skips the rest, unless -dev names another.
constexpr const char* kDeviceId = "turboquant";

void get_props(ggml_backend_dev_t dev, ggml_backend_dev_props* props) {
    props->name = device_of(dev).name.c_str();
    props->description = device_of(dev).description.c_str();
    props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    // Where there is a GPU, all have its id: llama.cpp's own device for it comes first, and stays what a program takes that names none.
    props->device_id = device_of(dev).shared_id.empty() ? kDeviceId : device_of(dev).shared_id.c_str();
    get_memory(dev, &props->memory_free, &props->memory_total);
    // mmap_support came with a later ggml; in earlier ones its byte is padding at the end of the struct.
    props->caps.async = props->caps.host_buffer = props->caps.buffer_from_host_ptr = props->caps.events = false;
    props->caps.mmap_support = true;
    if (const InnerDevice* gpu = device_of(dev).gpu) {
        ggml_backend_dev_props wrapped;
        ggml_backend_dev_get_props(gpu->wrapped(), &wrapped);
        props->caps.host_buffer = wrapped.caps.host_buffer;
        props->caps.async = wrapped.caps.async, props->caps.events = wrapped.caps.events;
    }
}

/// llama.cpp asks whether weights can lie in our memory with a tensor in an empty buffer of our type. It also has empty buffers for caches
/// that it only measures (--fit); those are named by their layer.
bool asks_for_weight(const ggml_tensor* t) { return t->buffer->size == 0 && !is_layer_state(t); }

/// Of layers that it does not have a GPU is asked only about products with weights (it might want to do them): attention over a foreign cache is
/// seen as what is multiplied. It is so in nearly all models; where a gate or a norm lies between, nothing is said.
void see_attention_before(Device& d, const ggml_tensor* op) {
    if (d.on_host() || !op->src[1]) return;
    const ggml_tensor* attention = producer(d.ops, op->src[1]);
    for (int i = 1; attention->op == d.ops.flash_attn && i <= 2; i++)
        if (is_foreign_cache(attention->src[i])) d.see_foreign_cache(root(attention->src[i]));
}

/// Weights stay in the CPU's buffers: mapped files and repacked weights need them, and all of their operations are taken here anyway. KV
/// tensors of layers that are not on this device are attended to by the CPU, as llama.cpp expects of such a layer (it turns flash attention
/// off if attention is computed elsewhere).
/// Everything that touches compressed rows is claimed, also what cannot be computed: a "no" here would make the scheduler abort the
/// process, or copy compressed bytes to another backend as if they were f16. Such a graph gets no memory, and fails in graph_compute if it
/// has some already.
bool supports_op(ggml_backend_dev_t dev, const ggml_tensor* op) {
    Device& d = device_of(dev);
    if (is_view_op(d.ops, op)) return true;
    bool compressed = is_kv(op);
    if (is_ours(op) && root(op)->buffer->buft != &d.buft) return false;
    for (const ggml_tensor* src : op->src) {
        if (!src || !is_ours(src)) continue;
        if (root(src)->buffer->buft != &d.buft) return false;
        compressed |= is_kv(src);
        if (asks_for_weight(root(src))) {
            d.has_layers = true;
            if (d.on_host()) return false;
        }
    }
    if (compressed) {
        bind_from_op(d, op);
        note_unservable(unservable(d, op));
        return true;
    }
    if (op->op == d.ops.set_rows && is_foreign_cache(op)) d.see_foreign_cache(root(op));
    if (op->op == d.ops.flash_attn && (is_foreign_cache(op->src[1]) || is_foreign_cache(op->src[2]))) {
        // On a GPU the scheduler does not ask who could write to a cache of the CPU's, only who could attend over it.
        for (int i = 1; !d.on_host() && i <= 2; i++)
            if (is_foreign_cache(op->src[i])) d.see_foreign_cache(root(op->src[i]));
        return false;
    }
    see_attention_before(d, op);
    return d.takes_all() && d.inner().supports_op(op);
}

bool supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    const Device& d = device_of(dev);
    return buft == &d.buft || d.inner().supports_buft(buft);
}

ggml_backend_device_i device_interface() {
    ggml_backend_device_i i{};
    i.get_name = [](ggml_backend_dev_t dev) { return device_of(dev).name.c_str(); };
    i.get_description = [](ggml_backend_dev_t dev) { return device_of(dev).description.c_str(); };
    i.get_memory = get_memory;
    i.get_type = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    i.get_props = get_props;
    i.init_backend = init_backend;
    i.get_buffer_type = [](ggml_backend_dev_t dev) -> ggml_backend_buffer_type_t { return &device_of(dev).buft; };
    i.supports_op = supports_op;
    i.supports_buft = supports_buft;
    i.get_host_buffer_type = [](ggml_backend_dev_t dev) -> ggml_backend_buffer_type_t {
        const InnerDevice* gpu = device_of(dev).gpu;
        return gpu ? ggml_backend_dev_host_buffer_type(gpu->wrapped()) : nullptr;
    };
    // Events are the wrapped device's own, and say so: ggml gives them to it where it waits for one or frees it.
    i.event_new = [](ggml_backend_dev_t dev) -> ggml_backend_event_t {
        const InnerDevice* gpu = device_of(dev).gpu;
        return gpu ? ggml_backend_event_new(gpu->wrapped()) : nullptr;
    };
    i.event_free = [](ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_free(event); };
    i.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t event) { ggml_backend_event_synchronize(event); };
    i.offload_op = [](ggml_backend_dev_t dev, const ggml_tensor* op) {
        const Device& d = device_of(dev);
        return d.gpu && d.takes_all() && d.gpu->offload_op(op);
    };
    return i;
}

ggml_backend_buffer_type_i buft_interface() {
    ggml_backend_buffer_type_i i{};
    i.get_name = [](ggml_backend_buffer_type_t buft) { return device_of(buft).buft_name.c_str(); };
    i.alloc_buffer = alloc_buffer;
    i.get_alignment = [](ggml_backend_buffer_type_t buft) { return device_of(buft).gpu ? device_of(buft).gpu->alignment() : size_t{128}; };
    i.get_alloc_size = alloc_size;
    // Never host: the CPU backend would read compressed bytes as f16.
    i.is_host = [](ggml_backend_buffer_type_t) { return false; };
    return i;
}

}  // namespace

Device::Interfaces device_interfaces() { return {device_interface(), buft_interface()}; }

}  // namespace turboquant::ggml
