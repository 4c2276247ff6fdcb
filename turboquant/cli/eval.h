// What cache formats cost in perplexity and KL divergence, for `turboquant eval` and the report.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "turboquant/cli/kv_resolve.h"
#include "turboquant/cli/score.h"
#include "turboquant/cli/session.h"

namespace turboquant::cli {

enum class EvalMode { batch, decode };

struct EvalOptions {
    std::string model{}, text_file{}, calib_file{};
    std::vector<std::string> kv{};
    WindowSizes windows{};
    ContextOptions context{};
    int chunks = 6;
    EvalMode mode = EvalMode::batch;
    bool json = false;
};

struct EvalResult {
    CacheSpec spec;
    KvMemory memory;
    ScoreSummary score;
    std::optional<Plan> plan{};  ///< of auto: and of plan files
};

/// All formats on the same chunks, in the order of o.kv. `file` is the model at o.model. Throws CommandError.
std::vector<EvalResult> evaluate(ModelFile& file, EvalOptions o);

/// An array of objects with the keys of docs/cli.md.
nlohmann::ordered_json to_json(const std::vector<EvalResult>& results);

}  // namespace turboquant::cli
