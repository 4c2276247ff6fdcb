// The GPUs of llama.cpp's CUDA backend, wrapped whole.
#pragma once

#include <string>
#include <vector>

#include "turboquant/ggml/host.h"
#include "turboquant/ggml/inner_device.h"

namespace turboquant::ggml {

struct Gpus {
    std::vector<const InnerDevice*> devices;  ///< good for the life of the process
    std::string none;                         ///< why there are none
};
/// llama.cpp's CUDA backend, or null: it is not loaded. Tests have another (tests/ggml/host_gpus.cpp).
ggml_backend_reg_t gpu_registry();
/// Those that this library's kernels run on, in the order of ggml's registry; asked once, when this library is loaded.
Gpus find_gpus(const Ops& ops);

}  // namespace turboquant::ggml
