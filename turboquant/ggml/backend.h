// The backend (stream) of a device: the wrapped device computes the graph, but for the operations on compressed rows.
#pragma once

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

/// Null, and the device has refused, if the wrapped device gives no backend.
ggml_backend_t init_backend(ggml_backend_dev_t dev, const char* params);
/// As ggml's procedures of these names; nothing is done to a backend that is not ours.
void set_n_threads(ggml_backend_t backend, int n_threads);
void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void* data);

}  // namespace turboquant::ggml
