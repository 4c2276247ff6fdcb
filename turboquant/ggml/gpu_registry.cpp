#include "turboquant/ggml/gpu_device.h"

namespace turboquant::ggml {

ggml_backend_reg_t gpu_registry() { return ggml_backend_reg_by_name("CUDA"); }

}  // namespace turboquant::ggml
