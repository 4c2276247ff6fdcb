// llama.cpp's CUDA backend, loaded before our library, which looks for it when it is loaded itself.
#pragma once

#include <string>

namespace turboquant::llama {

/// Loads `path`; if empty, libggml-cuda.so from where ggml's own libraries lie, if there is one. A backend that is there already (built in, or
/// GGML_BACKEND_PATH) is used as it is. Whether there is one now. Throws Error if `path` does not load.
bool load_gpu_backend(const std::string& path);

}  // namespace turboquant::llama
