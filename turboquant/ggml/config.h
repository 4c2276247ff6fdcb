// The one configuration variable of the plugin, read once at load: for what a device name cannot say.
//   TURBOQUANT_KV = TEXT[,abi=any]   TEXT as in --kv (spec/words.h): a SPEC, a plan's FILE.json, or auto:BITS, which are the best formats
//                                    within BITS per value that can be had without measuring (planner/prior.h)
#pragma once

#include <optional>
#include <string>

#include "turboquant/planner/plan.h"
#include "turboquant/spec/words.h"

namespace turboquant::ggml {

inline constexpr const char* kConfigVariable = "TURBOQUANT_KV";

struct Config {
    std::optional<KvSpec> spec;  ///< device "turboquant", first in the list; of a plan: its SPEC; of auto: its options
    std::optional<Plan> plan;
    double auto_bits = 0;  ///< 0: formats are as in spec
    bool any_abi = false;  ///< skip the version check
};

/// Throws std::invalid_argument as parse_kv_word and read_plan_file, and on a budget that is no number of bits.
Config parse_config(const char* text);
/// From the environment.
Config load_config();

}  // namespace turboquant::ggml
