// The backend library as this command uses it: loaded into the process by ggml, as in any other program, and asked through its own
// procedures.
#pragma once

#include <string>

#include "turboquant/ggml/plugin.h"
#include "turboquant/llama/cache_spec.h"

namespace turboquant::llama {

class Plugin {
  public:
    /// Loads `path`, or if empty libggml-turboquant.so from ../lib beside the executable. A library already loaded (GGML_BACKEND_PATH) is
    /// used as it is. Throws Error.
    explicit Plugin(const std::string& path);

    /// A device of its own, at a place as turboquant_new_device_at takes it; lives as long as the process. Throws Error with the library's reason.
    ggml_backend_dev_t new_device(const std::string& place) const;
    /// "CPU (no CUDA backend of llama.cpp is loaded)", "CUDA0 (NVIDIA H100 80GB HBM3)".
    std::string place(ggml_backend_dev_t dev) const { return place_(dev); }
    /// Of caches made on it from now on, llama.cpp's own types too. Throws Error with the library's reason.
    void set_spec(ggml_backend_dev_t dev, const CacheSpec& spec) const;
    turboquant_kv_stats stats(ggml_backend_dev_t dev) const;
    std::string last_error(ggml_backend_dev_t dev) const { return last_error_(dev); }
    std::string config(ggml_backend_dev_t dev) const { return config_(dev); }

  private:
    turboquant_new_device_at_t new_device_ = nullptr;
    turboquant_place_t place_ = nullptr;
    turboquant_set_spec_t set_spec_ = nullptr;
    turboquant_kv_stats_t stats_ = nullptr;
    turboquant_last_error_t last_error_ = nullptr;
    turboquant_config_t config_ = nullptr;
};

}  // namespace turboquant::llama
