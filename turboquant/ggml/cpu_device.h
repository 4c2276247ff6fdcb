// llama.cpp's CPU device as the wrapped one: our operations run on ggml's own threads, as custom operations of its graph.
#pragma once

#include "turboquant/ggml/host.h"
#include "turboquant/ggml/inner_device.h"

namespace turboquant::ggml {

/// Looked up at first use, not when the library is loaded: then the CPU backend may not be loaded yet. Throws std::runtime_error if the
/// process has none.
const InnerDevice& cpu_device(const Ops& ops);

}  // namespace turboquant::ggml
