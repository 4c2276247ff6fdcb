// Entry point of libggml-turboquant.so: the registry, its devices and its extra procedures (plugin.h).
#include <cctype>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <span>

#include "turboquant/ggml/backend.h"
#include "turboquant/ggml/config.h"
#include "turboquant/ggml/device_interface.h"
#include "turboquant/ggml/gpu_device.h"
#include "turboquant/ggml/plugin.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/spec/words.h"

namespace turboquant::ggml {
namespace {

struct Registry {
    ggml_backend_reg reg{};
    Ops ops{};
    Gpus gpus;
    std::deque<Device> devices;  // deque: ggml keeps pointers to them
    std::size_t n_listed = 0;    // those made for the turboquant_device procedure come after and are not listed
    std::mutex mutex;
};

Registry& registry() {
    static auto* r = new Registry;  // never destroyed: programs free their contexts after static destructors began
    return *r;
}

/// Where a device is that does not say so.
const InnerDevice* default_place() { return registry().gpus.devices.empty() ? nullptr : registry().gpus.devices.front(); }

std::string lower(std::string text) {
    for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return text;
}

/// Where caches are, and how to have them elsewhere.
std::string place_text() {
    const Gpus& gpus = registry().gpus;
    if (gpus.devices.empty()) return "on the CPU (" + gpus.none + ")";
    std::string text = "on " + gpus.devices.front()->name() + " where no place is named";
    for (const InnerDevice* gpu : gpus.devices) text += ", on " + gpu->name() + " as turbo4-" + lower(gpu->name());
    return text + ", on the CPU as turbo4-cpu";
}

/// A device more, on a GPU, or on the CPU (null).
Device& add_device(std::string name, const KvSpec& spec, const InnerDevice* gpu) {
    Registry& r = registry();
    Device& d = r.devices.emplace_back(&r.reg, device_interfaces(), r.ops, std::move(name), spec, gpu);
    if (const InnerDevice* one = gpu ? gpu : default_place()) {
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(one->wrapped(), &props);
        if (props.device_id) d.shared_id = props.device_id;
    }
    return d;
}

/// Why ggml_backend_init gave nothing.
std::string& load_error() {
    static auto* text = new std::string;
    return *text;
}

void tell(const std::exception& e, char* error, size_t error_size) {
    if (error && error_size) std::strncpy(error, e.what(), error_size - 1)[error_size - 1] = '\0';
}

ggml_backend_dev_t find_or_make_device(const char* text, char* error, size_t error_size) {
    try {
        const KvSpec spec = parse_kv_spec(text ? text : "");
        Registry& r = registry();
        const std::scoped_lock lock(r.mutex);
        for (Device& d : r.devices)
            if (d.spec == spec && !d.plan && d.auto_bits == 0 && !d.respecifiable && d.gpu == default_place()) return &d.device;
        return &add_device(brief_text(spec), spec, default_place()).device;
    } catch (const std::exception& e) {
        tell(e, error, error_size);
        return nullptr;
    }
}

ggml_backend_dev_t new_own_device(const InnerDevice* gpu) {
    Registry& r = registry();
    const std::scoped_lock lock(r.mutex);
    // llama.cpp tells buffer types apart by name: those of a model's devices must not be the same.
    Device& d = add_device("turboquant-own-" + (gpu ? lower(gpu->name()) : "cpu"), KvSpec{}, gpu);
    d.respecifiable = true;
    return &d.device;
}

ggml_backend_dev_t new_device() { return new_own_device(default_place()); }

ggml_backend_dev_t new_device_at(const char* place, char* error, size_t error_size) {
    try {
        const std::string name = place ? place : "";
        if (name.empty()) return new_own_device(default_place());
        if (name == "cpu") return new_own_device(nullptr);
        const Gpus& gpus = registry().gpus;
        for (const InnerDevice* gpu : gpus.devices)
            if (lower(gpu->name()) == name) return new_own_device(gpu);
        throw std::invalid_argument("there is no '" + name + "'" + (gpus.devices.empty() ? ": " + gpus.none : ", but " + place_text()));
    } catch (const std::exception& e) {
        tell(e, error, error_size);
        return nullptr;
    }
}

const char* device_place(ggml_backend_dev_t dev) {
    static thread_local std::string text;
    const Gpus& gpus = registry().gpus;
    if (const InnerDevice* gpu = device_of(dev).gpu)
        text = gpu->name() + " (" + ggml_backend_dev_description(gpu->wrapped()) + ")";
    else
        text = gpus.devices.empty() ? "CPU (" + gpus.none + ")" : "CPU";
    return text.c_str();
}

bool set_spec(ggml_backend_dev_t dev, const char* text, char* error, size_t error_size) {
    try {
        Device& d = device_of(dev);
        if (!d.respecifiable) throw std::invalid_argument("only a device of turboquant_new_device changes its SPEC");
        if (!text) return d.plain_caches = true;
        const Config config = parse_config(text);
        if (!config.spec || config.plan) throw std::invalid_argument("a SPEC is wanted, or auto:BITS");
        d.spec = *config.spec, d.auto_bits = config.auto_bits, d.plain_caches = false;
        return true;
    } catch (const std::exception& e) {
        tell(e, error, error_size);
        return false;
    }
}

const char* device_config(ggml_backend_dev_t dev) {
    static thread_local std::string text;
    const Device& d = device_of(dev);
    const std::string windows = d.windows();
    text = d.formats() + ", simd " + std::string(simd_level_name(kernels_level(kernels()))) + (windows.empty() ? "" : ", " + windows);
    return text.c_str();
}

const char* device_last_error(ggml_backend_dev_t dev) {
    static thread_local std::string text;
    text = device_of(dev).last_error();
    return text.c_str();
}

void* get_proc_address(ggml_backend_reg_t, const char* name) {
    const auto is = [name](const char* n) { return std::strcmp(name, n) == 0; };
    if (is("ggml_backend_set_n_threads")) return reinterpret_cast<void*>(&set_n_threads);
    if (is("ggml_backend_set_abort_callback")) return reinterpret_cast<void*>(&set_abort_callback);
    if (is("turboquant_device")) return reinterpret_cast<void*>(static_cast<turboquant_device_t>(&find_or_make_device));
    if (is("turboquant_new_device")) return reinterpret_cast<void*>(static_cast<turboquant_new_device_t>(&new_device));
    if (is("turboquant_new_device_at")) return reinterpret_cast<void*>(static_cast<turboquant_new_device_at_t>(&new_device_at));
    if (is("turboquant_place")) return reinterpret_cast<void*>(static_cast<turboquant_place_t>(&device_place));
    if (is("turboquant_set_spec")) return reinterpret_cast<void*>(static_cast<turboquant_set_spec_t>(&set_spec));
    if (is("turboquant_kv_stats"))
        return reinterpret_cast<void*>(
            static_cast<turboquant_kv_stats_t>([](ggml_backend_dev_t dev, turboquant_kv_stats* out) { *out = device_of(dev).stats(); }));
    if (is("turboquant_last_error")) return reinterpret_cast<void*>(static_cast<turboquant_last_error_t>(&device_last_error));
    if (is("turboquant_config")) return reinterpret_cast<void*>(static_cast<turboquant_config_t>(&device_config));
    return nullptr;
}

/// All devices of one place. The first is the default: what the configuration says; else the best that can be had without measuring, but on
/// a GPU turbo4, whose kernels are the fastest there.
void list_devices(const Config& config, const std::string& suffix, const InnerDevice* gpu) {
    if (config.spec) {
        Device& d = add_device("turboquant" + suffix, *config.spec, gpu);
        d.plan = config.plan, d.auto_bits = config.auto_bits;
        if (config.auto_bits > 0) d.description = "TurboQuant KV cache, " + auto_name(config.auto_bits);
    }
    const auto add_unmeasured = [&](const UnmeasuredWord& w) {
        Device& d = add_device(std::string(w.word) + suffix, uniform_spec(CodecId::raw, CodecId::raw), gpu);
        d.auto_bits = w.bits;
        d.description = "TurboQuant KV cache, " + auto_name(w.bits) + " without measurements";
    };
    const std::span<const UnmeasuredWord> unmeasured(kUnmeasured);
    if (!gpu) add_unmeasured(unmeasured.front());
    for (const CodecInfo& c : kCodecs) {
        if (is_composite(c.id)) continue;  // for comparison: through the configuration variable and turboquant_device only
        KvSpec spec;
        spec.k = spec.v = c.id;
        add_device(std::string(c.name) + suffix, spec, gpu);
    }
    for (const UnmeasuredWord& w : unmeasured.subspan(gpu ? 0 : 1)) add_unmeasured(w);
}

ggml_backend_reg_t make_registry() {
    const Config config = load_config();
    if (const std::string problem = check_ggml_version(ggml_version()); !problem.empty() && !config.any_abi)
        throw std::runtime_error(problem);
    Registry& r = registry();
    r.ops = resolve_ops();
    r.reg.api_version = kBackendApiVersion;
    r.reg.iface.get_name = [](ggml_backend_reg_t) { return "turboquant"; };
    r.reg.iface.get_device_count = [](ggml_backend_reg_t) { return registry().n_listed; };
    r.reg.iface.get_device = [](ggml_backend_reg_t, size_t i) { return &registry().devices[i].device; };
    r.reg.iface.get_proc_address = get_proc_address;
    r.gpus = find_gpus(r.ops);
    list_devices(config, "", default_place());
    if (default_place()) {
        list_devices(config, "-cpu", nullptr);
        for (const InnerDevice* gpu : r.gpus.devices) list_devices(config, std::string("-").append(lower(gpu->name())), gpu);
    }
    r.n_listed = r.devices.size();
    std::string formats = known_codec_words();
    if (config.spec)
        formats.insert(0, std::string("turboquant (")
                              .append(config.auto_bits > 0 ? auto_name(config.auto_bits) : brief_text(*config.spec))
                              .append("), "));
    log_info("KV cache formats " + formats + "; default " + r.devices.front().name + "; " + place_text() + "; simd " +
             std::string(simd_level_name(kernels_level(kernels()))));
    return &r.reg;
}

}  // namespace
}  // namespace turboquant::ggml

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
    using namespace turboquant::ggml;
    try {
        static const ggml_backend_reg_t reg = make_registry();
        if (const std::string problem = check_registry(__builtin_return_address(0)); !problem.empty()) log_error(problem);
        return reg;
    } catch (const std::exception& e) {
        log_error(load_error() = std::string("not loaded: ") + e.what());
        return nullptr;
    }
}

extern "C" __attribute__((visibility("default"))) const char* turboquant_load_error() { return turboquant::ggml::load_error().c_str(); }
