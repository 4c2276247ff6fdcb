// The backend library as this command uses it: loaded into the process by ggml, as in any other program, and asked through its own
// procedures.
#pragma once

#include <string>

#include "turboquant/ggml/plugin.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant::llama {

class Plugin {
  public:
    /// Loads `path`, or if empty libggml-turboquant.so from ../lib beside the executable. A library already loaded (GGML_BACKEND_PATH) is
    /// used as it is. Throws Error.
    explicit Plugin(const std::string& path);

    /// The device of a format; lives as long as the process. Throws Error with the library's reason.
    ggml_backend_dev_t device(const KvSpec& spec) const;
    turboquant_kv_stats stats(ggml_backend_dev_t dev) const;
    std::string last_error(ggml_backend_dev_t dev) const { return last_error_(dev); }
    std::string config(ggml_backend_dev_t dev) const { return config_(dev); }

  private:
    turboquant_device_t device_ = nullptr;
    turboquant_kv_stats_t stats_ = nullptr;
    turboquant_last_error_t last_error_ = nullptr;
    turboquant_config_t config_ = nullptr;
};

}  // namespace turboquant::llama
