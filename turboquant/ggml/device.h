// Devices, one per SPEC: what each is, what it has refused, which caches it holds.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/ggml/host.h"
#include "turboquant/ggml/inner_device.h"
#include "turboquant/ggml/placement.h"
#include "turboquant/ggml/plugin.h"
#include "turboquant/planner/plan.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant::ggml {

/// One side of one layer in a cache.
struct CacheSide {
    int layer = 0;
    Side side = Side::key;
    std::int64_t n_embd = 0, n_cells = 0;  ///< cells of all streams
};

/// A cache, as the choice of its formats sees it.
struct CacheShape {
    std::vector<CacheSide> sides;
    double fixed_bits = 0;  ///< of what is stored beside codes, whatever the formats
};

/// What a device asks of its buffers (buffer.h).
class DeviceBuffer {
  public:
    explicit DeviceBuffer(int context) : context_(context) {}
    /// Which of its device's contexts it belongs to (Device::context).
    int context() const { return context_; }
    virtual CacheShape cache_shape() const = 0;
    /// Layers and sides of its KV tensors.
    virtual std::set<std::pair<int, Side>> slots() const = 0;
    /// Whether this is a cache, or other state of layers: not a buffer of intermediate results.
    virtual bool has_state() const = 0;
    /// Exact windows of its largest cache; none given if it has no KV tensors.
    virtual WindowSizes windows() const = 0;
    /// Adds the memory of its KV tensors, and the values that their cells hold.
    virtual void add_stats(turboquant_kv_stats& s, double& values) const = 0;

  protected:
    ~DeviceBuffer() = default;

  private:
    int context_;
};

/// One device. ggml keeps pointers to `device` and `buft`, so a Device never moves and lives as long as the process.
struct Device {
    /// What it answers to ggml (device_interface.h).
    struct Interfaces {
        ggml_backend_device_i device;
        ggml_backend_buffer_type_i buft;
    };

    /// `gpu`: the wrapped device, or null: the CPU's, which need not be there yet.
    Device(ggml_backend_reg_t reg, const Interfaces& interfaces, const Ops& ops, std::string name, const KvSpec& spec,
           const InnerDevice* gpu = nullptr);
    Device(const Device&) = delete;

    Ops ops;
    const InnerDevice* gpu;
    std::string name, description, buft_name;
    std::string word;            ///< of the formats: name without the place
    std::string shared_id;       ///< the GPU's, where there is one
    KvSpec spec;                 ///< of caches to come; those that exist have a copy (KvBuffer::spec)
    bool respecifiable = false;  ///< turboquant_set_spec may change spec
    bool plain_caches = false;   ///< caches to come are llama.cpp's own, of any type
    std::optional<Plan> plan;    ///< what spec came from: a cache is held against its layers
    double auto_bits = 0;        ///< not 0: spec holds the options only, formats are chosen when a cache shows its layers (decide_formats)
    /// A context begins that has this device.
    void begin_context();
    /// The number of the context that began last.
    int context() const;
    /// The cache of `mine`, and those beside it in its context that can have heads of head_dim, too: a model with sliding windows in some layers
    /// keeps two. Its own sides come first.
    CacheShape of_context(const DeviceBuffer& mine, int head_dim) const;
    /// A graph writes rows of a KV tensor that is not ours: warns, once a context, of layers whose cache stays uncompressed.
    void see_foreign_cache(const ggml_tensor* tensor);

    std::atomic<bool> fitting = false;  ///< llama.cpp's --fit has asked for the size of a cache that it will not allocate
    ggml_backend_device device;
    ggml_backend_buffer_type buft;
    /// llama.cpp has asked for weights in our memory: a model has layers on this device. Until then, and as long as there is no cache
    /// either, the device takes no operation, so that a context without layers here runs as if the device were not there (-ngl 0).
    std::atomic<bool> has_layers = false;
    std::atomic<int> n_threads = 1;  ///< of the last graph: state is saved and restored by as many

    /// The wrapped device. Throws std::runtime_error.
    const InnerDevice& inner() const;
    bool on_host() const { return !gpu || gpu->on_host(); }
    /// Whether operations that have nothing to do with a cache are taken, too.
    bool takes_all() const;

    /// Records and logs a refusal; returns the text kept.
    void refuse(const std::string& text);
    std::string last_error() const;
    /// What was chosen for the last cache, with auto_bits; logged.
    void note_choice(const std::string& text);
    /// The formats, in words.
    std::string formats() const;
    /// "exact sink=4,recent=26:4": the windows of the last cache alive, "" if there is none.
    std::string windows() const;
    /// Layers and sides of all caches alive.
    std::set<std::pair<int, Side>> slots() const;

    void add(DeviceBuffer* b);
    void remove(DeviceBuffer* b);
    turboquant_kv_stats stats() const;

  private:
    mutable std::mutex mutex_;
    std::string last_error_, choice_;
    Placement placement_;
    std::vector<DeviceBuffer*> buffers_;
    int context_ = 0;
};

/// Why the graph that this thread is showing to a device cannot be computed: noted when its operations are offered, taken when memory for
/// it is asked for, which is refused then. A context that cannot work is so not made at all.
void note_unservable(std::string why);
std::string take_unservable();

inline Device& device_of(ggml_backend_dev_t dev) { return *static_cast<Device*>(dev->context); }
inline Device& device_of(ggml_backend_buffer_type_t buft) { return *static_cast<Device*>(buft->context); }

/// The tensor that a view looks into, or the tensor itself.
inline const ggml_tensor* root(const ggml_tensor* t) { return t->view_src ? t->view_src : t; }

}  // namespace turboquant::ggml
