// The device of llama.cpp that one of ours wraps. It computes every node of a graph that is no operation on compressed rows, so that all
// nodes of a model are ours: no splits between devices, no copies, and layers that only read another layer's cache are no special case.
#pragma once

#include <functional>
#include <memory>
#include <span>

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
};

class InnerDevice {
  public:
    virtual ~InnerDevice() = default;
    virtual bool supports_op(const ggml_tensor* op) const = 0;
    virtual bool supports_buft(ggml_backend_buffer_type_t buft) const = 0;
    /// Throws std::runtime_error.
    virtual std::unique_ptr<InnerBackend> new_backend() const = 0;
};

}  // namespace turboquant::ggml
