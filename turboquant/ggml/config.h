// The one configuration variable of the plugin, read once at load: for what a device name cannot say.
//   TURBOQUANT_KV = SPEC[,abi=any]     SPEC as in --kv (cache/kv_spec.h)
#pragma once

#include <optional>
#include <string>

#include "turboquant/cache/kv_spec.h"

namespace turboquant::ggml {

inline constexpr const char* kConfigVariable = "TURBOQUANT_KV";

struct Config {
    std::optional<KvSpec> spec;  ///< device "turboquant", first in the list
    bool any_abi = false;        ///< skip the version check
};

/// Throws std::invalid_argument as parse_kv_spec.
Config parse_config(const char* text);
/// From the environment.
Config load_config();

}  // namespace turboquant::ggml
