// Buffers of our devices: KV tensors in compressed form, everything else (outputs of our ops) as ggml lays it out.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "turboquant/cache/layer_cache.h"
#include "turboquant/ggml/device.h"
#include "turboquant/ggml/input_copies.h"

namespace turboquant::ggml {

/// What a KV tensor carries in ggml_tensor::extra: the cache of its layer, and which side of it it is.
struct KvExtra {
    LayerCache* layer = nullptr;
    Side side = Side::key;
    std::uint8_t* memory = nullptr;  ///< of the tensor
    bool written = false;            ///< rows were written: the head size stays
    std::string refused{};           ///< why it cannot be served (head size, plan); every op on it fails

    KvTensor& kv() const { return layer->tensor(side); }
    bool bound() const { return kv().bound(); }
};

/// What to do about a cache that a plan does not fit.
inline constexpr const char* kPlanRemedy =
    "; if this is the cache of a draft model, give that a device of its own (-devd turbo4, or -devd none)";

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size);
size_t alloc_size(ggml_backend_buffer_type_t buft, const ggml_tensor* t);

/// True for a tensor or view whose memory is of one of our devices.
bool is_ours(const ggml_tensor* t);
/// True if it is a KV tensor, compressed.
bool is_kv(const ggml_tensor* t);
/// Side of a KV tensor by its name ("cache_k_l7", "cache_v_l7"), nullopt for any other tensor. Caches beside that of keys and values
/// ("cache_idx_k_l7") are none: what is done with their rows is a model's own.
std::optional<Side> kv_side(const ggml_tensor* t);
/// True for any tensor that a context keeps for a layer, by its name ("..._l7"): KV tensors, recurrent state, what comes with sparse
/// attention. Those that are no KV tensors stay as they are.
bool is_layer_state(const ggml_tensor* t);
/// True for a KV tensor, or a view of one, that lies in another backend's memory.
bool is_foreign_cache(const ggml_tensor* t);
/// Layer number of a KV tensor by its name.
int kv_layer(const std::string& name);
/// The extra of the tensor under t, or null (not a KV tensor, or not allocated: llama.cpp measures with dummy buffers).
KvExtra* kv_extra(const ggml_tensor* t);

/// What a tensor of a graph holds, for the host: where it is, or in `memory`. Inputs are known without waiting (input_copies.h), all else is
/// waited for.
const void* on_host(const ggml_tensor* t, std::vector<std::uint8_t>& memory);
/// Whether an input of many values is on the device before its graph is computed; the host then asks the device about it.
bool is_there(const ggml_tensor* t);

/// Learns head sizes and RoPE from an attention or row-writing op. Attention has the last word on the head size, until rows are written
/// (`computing`). A size that cannot be served marks the tensor refused.
void bind_from_op(const Device& d, const ggml_tensor* op, bool computing = false);

/// Context of one ggml buffer.
class KvBuffer final : public DeviceBuffer {
  public:
    KvBuffer(Device& device, size_t size);  ///< throws std::bad_alloc, std::runtime_error
    ~KvBuffer();
    KvBuffer(const KvBuffer&) = delete;

    Device& device() const { return device_; }
    const KvSpec& spec() const { return spec_; }
    void* base() const { return memory_->base(); }
    InnerMemory& memory() const { return *memory_; }
    /// Of a device whose caches were llama.cpp's own when it was made.
    bool plain_caches() const { return plain_caches_; }
    /// Tensors that are no KV tensors.
    void set_plain(ggml_tensor* t, const void* data, size_t offset, size_t size);
    bool copy_plain(const ggml_tensor* src, ggml_tensor* dst);
    InputCopies& inputs() { return inputs_; }
    std::mutex apart;                    ///< of verbs outside of graphs
    std::shared_ptr<void> apart_device;  ///< StoreContext::device of those
    /// False, and the device has refused, if the tensor cannot be served: then llama.cpp makes no cache, and no context.
    bool init_tensor(ggml_tensor* t);
    /// Holds the cache against the device's plan, or chooses formats within its budget. Called with the first operation on the cache, whose
    /// heads have head_dim values: then all layers are there. If the plan or the budget does not fit, all tensors are refused.
    void decide_formats(int head_dim);
    /// To be held while a tensor is made anew or learns its head size: others ask for its figures.
    [[nodiscard]] std::unique_lock<std::mutex> changing() const { return std::unique_lock(lists_); }
    std::set<std::pair<int, Side>> slots() const override;
    CacheShape cache_shape() const override;
    /// Says in one line what this cache is, as soon as the head sizes of all its layers are known.
    void announce();
    /// Says once that saved state is as large as f16's.
    void note_saved();
    /// Says that rows of a restored state were lost, once for every cause until the next batch is written: the tensors of all layers and
    /// all their ranges have the same to say.
    void report_lost(const ggml_tensor* t, RestoreResult why);
    void begin_batch() { reported_.clear(); }
    void clear(std::uint8_t value);
    bool has_state() const override {
        const std::scoped_lock lock(lists_);
        return !tensors_.empty() || !plain_.empty();
    }
    WindowSizes windows() const override;
    void add_stats(turboquant_kv_stats& s, double& values) const override;

  private:
    Device& device_;
    const KvSpec spec_;  ///< the device's when the buffer was made
    const double auto_bits_;
    const bool plain_caches_;
    const std::unique_ptr<InnerMemory> memory_;
    InputCopies inputs_;
    /// Of the lists of tensors: threads of other contexts ask (Device::slots, stats) while this one is made. Taken after the
    /// device's mutex, never before it.
    mutable std::mutex lists_;
    std::vector<std::unique_ptr<KvExtra>> tensors_;
    std::vector<std::string> names_;                             ///< of tensors_
    std::vector<std::unique_ptr<CellPositions>> cells_;          ///< of each shape of cache
    std::map<std::string, std::unique_ptr<LayerCache>> layers_;  ///< by the name of their keys
    std::map<std::string, size_t> plain_;                        ///< bytes of the layers' other state, by its name without the layer
    bool plain_told_ = false;
    bool decided_ = false, announced_ = false, saved_told_ = false;
    std::set<RestoreResult> reported_;

    CellPositions& cells_for(const KvGeometry& g);
    void choose_formats(int head_dim);
    void log_plain();
};

}  // namespace turboquant::ggml
