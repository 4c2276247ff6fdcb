// What ggml-turboquant-as-gpu has for llama.cpp's CUDA backend: two devices over the CPU's, with buffers, streams and events of their own. All
// is done at once and in order; whether streams wait for each other where they must is what their clocks tell (tests/cuda/host_streams.h). A
// graph that reads what was not waited for fails.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "tests/cuda/host_streams.h"
#include "turboquant/ggml/gpu_device.h"

namespace turboquant::ggml {
namespace {

using cuda::test::HostEvent;
using cuda::test::HostStream;

constexpr int kGpus = 2;

ggml_backend_dev_t cpu() { return ggml_backend_reg_dev_get(ggml_backend_reg_by_name("CPU"), 0); }

struct HostGpu {
    ggml_backend_device device{};
    ggml_backend_buffer_type buft{};
    std::string name;
};
HostGpu& gpu_of(ggml_backend_dev_t dev) { return *static_cast<HostGpu*>(dev->context); }

struct HostBackend {
    ggml_backend backend{};
    ggml_backend_t cpu = nullptr;
    HostStream stream;
};
HostBackend& of(ggml_backend_t backend) { return *static_cast<HostBackend*>(backend->context); }
HostEvent& of(ggml_backend_event_t event) { return *static_cast<HostEvent*>(event->context); }

bool wrong(const std::string& what) { return log_error("host GPU: " + what), false; }

// Buffers: the CPU's, of another type, so that nobody takes them for the host's.

ggml_backend_buffer_i cpu_buffer;

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, std::size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(cpu()), size);
    if (!buffer) return nullptr;
    cpu_buffer = buffer->iface;
    buffer->buft = buft;
    buffer->iface.free_buffer = [](ggml_backend_buffer_t b) {
        HostStream::freed(ggml_backend_buffer_get_base(b), b->size);
        cpu_buffer.free_buffer(b);
    };
    buffer->iface.set_tensor = [](ggml_backend_buffer_t b, ggml_tensor* t, const void* data, std::size_t offset, std::size_t n) {
        HostStream::host_writes(t->data);
        cpu_buffer.set_tensor(b, t, data, offset, n);
    };
    buffer->iface.get_tensor = [](ggml_backend_buffer_t b, const ggml_tensor* t, void* data, std::size_t offset, std::size_t n) {
        if (!HostStream::host_may_read(t->data)) wrong(std::string("the host reads '") + t->name + "', which it has not waited for");
        cpu_buffer.get_tensor(b, t, data, offset, n);
    };
    buffer->iface.cpy_tensor = [](ggml_backend_buffer_t b, const ggml_tensor* src, ggml_tensor* dst) {
        if (src->buffer->buft->iface.alloc_buffer != b->buft->iface.alloc_buffer) return false;
        std::memcpy(dst->data, src->data, ggml_nbytes(dst));
        return true;
    };
    return buffer;
}

// Streams.

bool computes(const ggml_tensor* node) {
    const std::array<ggml_op, 5> views = {GGML_OP_NONE, GGML_OP_VIEW, GGML_OP_RESHAPE, GGML_OP_PERMUTE, GGML_OP_TRANSPOSE};
    return std::ranges::find(views, node->op) == views.end();
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph* graph) {
    HostStream& stream = of(backend).stream;
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const ggml_tensor* node = ggml_graph_node(graph, i);
        if (!computes(node)) continue;
        for (const ggml_tensor* src : node->src) {
            if (!src) continue;
            if (!stream.may_read(src->data))
                return wrong(std::string("'") + node->name + "' reads '" + src->name + "' before it is there"), GGML_STATUS_FAILED;
            stream.reads(src->data);
        }
        stream.writes(node->data);
    }
    return ggml_backend_graph_compute(of(backend).cpu, graph);
}

bool is_host_gpus(ggml_backend_t backend) { return backend->iface.graph_compute == graph_compute; }
/// As CUDA's: backend and buffer are of one device.
bool is_there(ggml_backend_t backend, const ggml_tensor* t) {
    const ggml_backend_buffer* buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return is_host_gpus(backend) && buffer && buffer->buft == &gpu_of(backend->device).buft;
}

bool cpy_tensor_async(ggml_backend_t from, ggml_backend_t to, const ggml_tensor* src, ggml_tensor* dst) {
    if (!is_there(from, src) || !is_there(to, dst)) return false;
    HostStream &source = of(from).stream, &stream = of(to).stream;
    if (!source.may_read(src->data)) wrong(std::string("'") + src->name + "' is copied before it is there");
    if (!source.may_write(dst->data)) wrong(std::string("'") + dst->name + "' is copied to while it is read");
    std::memcpy(dst->data, src->data, ggml_nbytes(dst));
    HostEvent copied;
    source.writes(dst->data), source.record(copied), stream.wait_for(copied);
    log_info("host GPU: copied from " + gpu_of(from->device).name + " to " + gpu_of(to->device).name);
    return true;
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char*) {
    static ggml_guid guid = {0x68, 0x6f, 0x73, 0x74};
    auto* b = new HostBackend;
    b->cpu = ggml_backend_dev_init(cpu(), nullptr);
    b->backend.guid = &guid, b->backend.device = dev, b->backend.context = b;
    ggml_backend_i& i = b->backend.iface;
    i.get_name = [](ggml_backend_t x) { return gpu_of(x->device).name.c_str(); };
    i.free = [](ggml_backend_t x) {
        ggml_backend_free(of(x).cpu);
        delete &of(x);
    };
    i.graph_compute = graph_compute;
    i.cpy_tensor_async = cpy_tensor_async;
    i.synchronize = [](ggml_backend_t x) { of(x).stream.done(); };
    i.get_tensor_async = [](ggml_backend_t x, const ggml_tensor* t, void* data, std::size_t offset, std::size_t n) {
        if (!is_there(x, t) || !of(x).stream.may_read(t->data)) wrong(std::string("'") + t->name + "' is fetched before it is there");
        std::memcpy(data, static_cast<const char*>(t->data) + offset, n);
    };
    i.set_tensor_async = [](ggml_backend_t x, ggml_tensor* t, const void* data, std::size_t offset, std::size_t n) {
        if (!is_there(x, t)) wrong(std::string("'") + t->name + "' is set by another device's stream");
        of(x).stream.writes(t->data);
        std::memcpy(static_cast<char*>(t->data) + offset, data, n);
    };
    i.event_record = [](ggml_backend_t x, ggml_backend_event_t e) { of(x).stream.record(of(e)); };
    i.event_wait = [](ggml_backend_t x, ggml_backend_event_t e) { of(x).stream.wait_for(of(e)); };
    return &b->backend;
}

ggml_backend_reg_t make_registry() {
    static ggml_backend_reg reg{};
    static auto& gpus = *new std::array<HostGpu, kGpus>;  // never destroyed: programs free their contexts after static destructors began
    reg.api_version = kBackendApiVersion;
    reg.iface.get_name = [](ggml_backend_reg_t) { return "CPU"; };
    reg.iface.get_device_count = [](ggml_backend_reg_t) { return gpus.size(); };
    reg.iface.get_device = [](ggml_backend_reg_t, std::size_t i) { return &gpus[i].device; };
    for (HostGpu& gpu : gpus) {
        gpu.name = "CPU" + std::to_string(&gpu - gpus.data());
        gpu.device = {cpu()->iface, &reg, &gpu};
        ggml_backend_device_i& i = gpu.device.iface;
        i.get_name = [](ggml_backend_dev_t dev) { return gpu_of(dev).name.c_str(); };
        i.get_memory = [](ggml_backend_dev_t, std::size_t* free, std::size_t* total) { ggml_backend_dev_memory(cpu(), free, total); };
        i.get_props = [](ggml_backend_dev_t, ggml_backend_dev_props* props) {
            ggml_backend_dev_get_props(cpu(), props);
            props->caps.async = props->caps.events = props->caps.host_buffer = true;
        };
        i.init_backend = init_backend;
        i.get_buffer_type = [](ggml_backend_dev_t dev) -> ggml_backend_buffer_type_t { return &gpu_of(dev).buft; };
        i.get_host_buffer_type = [](ggml_backend_dev_t) { return ggml_backend_dev_buffer_type(cpu()); };
        i.supports_op = [](ggml_backend_dev_t, const ggml_tensor* op) { return ggml_backend_dev_supports_op(cpu(), op); };
        i.supports_buft = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &gpu_of(dev).buft; };
        i.event_new = [](ggml_backend_dev_t dev) { return new ggml_backend_event{dev, new HostEvent}; };
        i.event_free = [](ggml_backend_dev_t, ggml_backend_event_t e) {
            delete &of(e);
            delete e;
        };
        i.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t e) { HostStream::done(of(e)); };
        gpu.buft = {{}, &gpu.device, &gpu};
        gpu.buft.iface.get_name = [](ggml_backend_buffer_type_t buft) { return gpu_of(buft->device).name.c_str(); };
        gpu.buft.iface.alloc_buffer = alloc_buffer;
        gpu.buft.iface.get_alignment = [](ggml_backend_buffer_type_t) {
            return ggml_backend_buft_get_alignment(ggml_backend_dev_buffer_type(cpu()));
        };
        gpu.buft.iface.is_host = [](ggml_backend_buffer_type_t) { return false; };
    }
    return &reg;
}

}  // namespace

ggml_backend_reg_t gpu_registry() {
    static const ggml_backend_reg_t reg = ggml_backend_reg_by_name("CPU") ? make_registry() : nullptr;
    return reg;
}

}  // namespace turboquant::ggml
