// In place of gpu_device.cpp where this library is built without CUDA.
#include "turboquant/ggml/gpu_device.h"

namespace turboquant::ggml {

Gpus find_gpus(const Ops&) { return {{}, "this library was built without CUDA"}; }

}  // namespace turboquant::ggml
