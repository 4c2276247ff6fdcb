// The one configuration variable of the plugin, read once at load: for what a device name cannot say.
//   TURBOQUANT_KV = SPEC[,abi=any]               SPEC as in --kv (cache/kv_spec.h)
//                 | FILE.json[,abi=any]          a plan written by `turboquant plan`
//                 | auto:BITS[,ITEM...][,abi=any]  the best formats within BITS per value that can be had without measuring
//                                              (planner/prior.h); ITEMs as in a SPEC: offset=off
#pragma once

#include <optional>
#include <string>

#include "turboquant/cache/kv_spec.h"
#include "turboquant/planner/plan.h"

namespace turboquant::ggml {

inline constexpr const char* kConfigVariable = "TURBOQUANT_KV";

struct Config {
    std::optional<KvSpec> spec;  ///< device "turboquant", first in the list; of a plan: its SPEC; of auto: its options
    std::optional<Plan> plan;
    double auto_bits = 0;  ///< 0: formats are as in spec
    bool any_abi = false;  ///< skip the version check
};

/// Throws std::invalid_argument as parse_kv_spec and read_plan_file, and on a budget that is no number of bits.
Config parse_config(const char* text);
/// "auto:4.25".
std::string auto_name(double bits);
/// From the environment.
Config load_config();

}  // namespace turboquant::ggml
