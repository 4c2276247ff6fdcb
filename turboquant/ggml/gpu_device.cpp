#include "turboquant/ggml/gpu_device.h"

#include <new>
#include <stdexcept>

#include "turboquant/cache/cuda/cuda_store.h"
#include "turboquant/cuda/memory.h"
#include "turboquant/ggml/gpu_backend.h"

namespace turboquant::ggml {
namespace {

/// A buffer of the wrapped device's own type; that of ours is only asked for what it is.
class GpuMemory final : public InnerMemory {
  public:
    GpuMemory(ggml_backend_buffer_t buffer, int index) : buffer_(buffer), index_(index) {}
    ~GpuMemory() override {
        if (cuda::driver_alive()) ggml_backend_buffer_free(buffer_);  // else llama.cpp's backend would end the process
    }
    GpuMemory(const GpuMemory&) = delete;

    void* base() const override { return ggml_backend_buffer_get_base(buffer_); }
    void init_tensor(ggml_tensor* t) override {
        if (buffer_->iface.init_tensor) buffer_->iface.init_tensor(buffer_, t);
    }
    ggml_tensor as_wrapped(const ggml_tensor* t) const override {
        ggml_tensor wrapped = *t;
        wrapped.buffer = buffer_, wrapped.view_src = nullptr;
        return wrapped;
    }
    void get(const ggml_tensor* t, void* data, std::size_t offset, std::size_t size) const override {
        buffer_->iface.get_tensor(buffer_, t, data, offset, size);
    }
    void set(ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) override {
        buffer_->iface.set_tensor(buffer_, t, data, offset, size);
    }
    void fill(ggml_tensor* t, std::uint8_t value, std::size_t offset, std::size_t size) override {
        buffer_->iface.memset_tensor(buffer_, t, value, offset, size);
    }
    bool copy(const InnerMemory& from, const ggml_tensor* src, ggml_tensor* dst) override {
        if (!buffer_->iface.cpy_tensor) return false;
        ggml_tensor s = from.as_wrapped(src), d = as_wrapped(dst);
        return buffer_->iface.cpy_tensor(buffer_, &s, &d);
    }
    void clear() override { fill_all(0); }
    void fill_all(std::uint8_t value) override { buffer_->iface.clear(buffer_, value); }
    std::size_t touched(const void*, std::size_t size) const override { return size; }
    void synchronize() const override { Queue::synchronize_all(index_); }

  private:
    ggml_backend_buffer_t buffer_;
    int index_;
};

class GpuDevice final : public InnerDevice {
  public:
    GpuDevice(ggml_backend_dev_t dev, int index, const Ops& ops, std::string name)
        : ops_(ops), dev_(dev), index_(index), name_(std::move(name)), buft_(ggml_backend_dev_buffer_type(dev)) {}

    bool supports_op(const ggml_tensor* op) const override { return ggml_backend_dev_supports_op(dev_, op); }
    bool supports_buft(ggml_backend_buffer_type_t buft) const override {
        return !ggml_backend_buft_is_host(buft) && ggml_backend_dev_supports_buft(dev_, buft);
    }
    std::unique_ptr<InnerBackend> new_backend() const override { return std::make_unique<GpuBackend>(dev_, index_, ops_); }
    std::string name() const override { return name_; }
    bool on_host() const override { return false; }
    std::unique_ptr<InnerMemory> new_memory(std::size_t size) const override {
        ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(buft_, size);
        if (!buffer) throw std::bad_alloc();
        return std::make_unique<GpuMemory>(buffer, index_);
    }
    bool takes_residuals() const override { return false; }
    StoreFactory store_in(std::uint8_t* memory) const override { return cuda_store_in(memory, index_); }
    std::size_t alloc_size(const ggml_tensor* t) const override { return ggml_backend_buft_get_alloc_size(buft_, t); }
    std::size_t alignment() const override { return ggml_backend_buft_get_alignment(buft_); }
    int most_offsets() const override { return cuda::kMaxTerms; }
    bool offload_op(const ggml_tensor* op) const override { return ggml_backend_dev_offload_op(dev_, op); }
    ggml_backend_dev_t wrapped() const override { return dev_; }

  private:
    Ops ops_;
    ggml_backend_dev_t dev_;
    int index_;
    std::string name_;
    ggml_backend_buffer_type_t buft_;
};

}  // namespace

Gpus find_gpus(const Ops& ops) {
    Gpus gpus;
    ggml_backend_reg_t reg = gpu_registry();
    if (!reg) return {{}, "no CUDA backend of llama.cpp is loaded"};
    for (std::size_t i = 0; i < ggml_backend_reg_dev_count(reg); i++) {
        ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, i);
        cuda::Device device;
        const cuda::Status status = cuda::query_device(static_cast<int>(i), device);
        if (!status.ok())
            gpus.none = status.message();
        else if (device.compute_capability < 80)
            gpus.none = device.name + " is older than Ampere (sm_80)";
        else
            gpus.devices.push_back(new GpuDevice(dev, static_cast<int>(i), ops, ggml_backend_reg_name(reg) + std::to_string(i)));
    }
    if (gpus.devices.empty() && gpus.none.empty()) gpus.none = "llama.cpp's CUDA backend finds no GPU";
    return gpus;
}

}  // namespace turboquant::ggml
