// Results as JSON, with the keys of docs/cli.md.
#pragma once

#include <vector>

#include "nlohmann/json_fwd.hpp"
#include "turboquant/measure/decode_speed.h"
#include "turboquant/measure/evaluate.h"
#include "turboquant/measure/inspect.h"
#include "turboquant/measure/needle.h"

namespace turboquant::cli {

/// Arrays of objects, but for an inspection, which is one object.
nlohmann::ordered_json to_json(const std::vector<measure::EvalResult>& results);
nlohmann::ordered_json to_json(const std::vector<measure::DecodeSpeed>& speeds);
nlohmann::ordered_json to_json(const std::vector<measure::NeedleResult>& results);
nlohmann::ordered_json to_json(const measure::Inspection& inspection);

}  // namespace turboquant::cli
