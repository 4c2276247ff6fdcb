// The device of llama.cpp that one of ours wraps. It computes every node of a graph that is no operation on compressed rows, so that all
// nodes of a model are ours: no splits between devices, no copies, and layers that only read another layer's cache are no special case.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "turboquant/cache/tile_store.h"
#include "turboquant/ggml/abi.h"
#include "turboquant/kernels/executor.h"

namespace turboquant::ggml {

/// A stream of the wrapped device.
class InnerBackend {
  public:
    virtual ~InnerBackend() = default;

    virtual void set_n_threads(int n) = 0;
    /// Asked between nodes; true stops the graph.
    virtual void set_abort_callback(ggml_abort_callback callback, void* data) = 0;

    /// Computes a node that the wrapped device cannot; the executor is good for that call. False stops the graph. Must not throw.
    using OwnNode = std::function<bool(const ggml_tensor* node, Executor& executor)>;
    /// Computes nodes first .. end-1 of a graph in order; `run` computes those in `own` (ascending indices in that range). The graph's
    /// nodes may be replaced during the call and are as before afterwards. GGML_STATUS_ABORTED if run() or the abort callback stopped it.
    virtual ggml_status compute(ggml_cgraph* graph, int first, int end, std::span<const int> own, const OwnNode& run) = 0;

    /// For work between two calls of compute().
    virtual Executor& executor() = 0;
    /// StoreContext::device of the stream's work, or null.
    virtual std::shared_ptr<void> store_device() { return nullptr; }
    virtual void synchronize() {}
    /// The wrapped device's own, on which compute() ends; null: compute() waits.
    virtual ggml_backend_t stream() { return nullptr; }
    /// Why the graph before this one was wrong, found out by now; "" if it was not.
    virtual std::string late_error() { return {}; }
};

/// Memory of one of our buffers, on the wrapped device. Addresses are what its operations take.
class InnerMemory {
  public:
    virtual ~InnerMemory() = default;
    virtual void* base() const = 0;
    virtual void init_tensor(ggml_tensor*) {}
    /// A tensor here as the wrapped device knows it, for its own stream: in a buffer of its type.
    virtual ggml_tensor as_wrapped(const ggml_tensor* t) const { return *t; }
    virtual void get(const ggml_tensor* t, void* data, std::size_t offset, std::size_t size) const = 0;
    virtual void set(ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) = 0;
    virtual void fill(ggml_tensor* t, std::uint8_t value, std::size_t offset, std::size_t size) = 0;
    /// All of a tensor from one of the same layout in memory of the same device; false: through the host.
    virtual bool copy(const InnerMemory& from, const ggml_tensor* src, ggml_tensor* dst) = 0;
    /// All zero; what it took of the machine's memory may be given back.
    virtual void clear() = 0;
    virtual void fill_all(std::uint8_t value) = 0;
    /// Of `size` bytes from `first` on, what takes memory.
    virtual std::size_t touched(const void* first, std::size_t size) const = 0;
    /// Waits for work under way on it.
    virtual void synchronize() const {}
};

class InnerDevice {
  public:
    virtual ~InnerDevice() = default;
    virtual bool supports_op(const ggml_tensor* op) const = 0;
    virtual bool supports_buft(ggml_backend_buffer_type_t buft) const = 0;
    /// Throws std::runtime_error.
    virtual std::unique_ptr<InnerBackend> new_backend() const = 0;

    /// Where it is, for the user: "CPU", "CUDA0".
    virtual std::string name() const = 0;
    /// Whether its memory is the host's. Else weights lie in our buffers, and what the host must know of a graph's inputs is copied.
    virtual bool on_host() const = 0;
    /// Throws std::bad_alloc.
    virtual std::unique_ptr<InnerMemory> new_memory(std::size_t size) const = 0;
    /// Whether exact windows can be residuals (TileStore::takes_residuals); unless said otherwise they are of fp16 where they cannot.
    virtual bool takes_residuals() const = 0;
    virtual StoreFactory store_in(std::uint8_t* memory) const = 0;
    virtual std::size_t alloc_size(const ggml_tensor* t) const { return ggml_nbytes(t); }
    virtual std::size_t alignment() const { return 128; }
    /// Sequences of a stream that have offsets of their own.
    virtual int most_offsets() const { return CellPositions::kMaxOffsets; }
    virtual bool offload_op(const ggml_tensor*) const { return false; }
    /// ggml's device, or null: its memory is the host's.
    virtual ggml_backend_dev_t wrapped() const { return nullptr; }
};

}  // namespace turboquant::ggml
