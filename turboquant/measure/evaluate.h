// What cache formats cost in perplexity and KL divergence, against the same model with llama.cpp's own f16 cache. Chunks, scored positions
// and statistics are those of llama-perplexity --kl-divergence.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "turboquant/llama/session.h"
#include "turboquant/measure/kv_resolve.h"
#include "turboquant/measure/score.h"

namespace turboquant::measure {

enum class EvalMode { batch, decode };

struct EvalOptions {
    std::string text_file{}, calib_file{};
    std::vector<std::string> kv{};
    WindowSizes windows{};
    llama::ContextOptions context{};
    int chunks = 6;
    EvalMode mode = EvalMode::batch;
};

struct EvalResult {
    llama::CacheSpec spec;
    llama::KvMemory memory;
    ScoreSummary score;
    std::optional<Plan> plan{};  ///< of auto: and of plan files
};

/// All formats on the same chunks, in the order of o.kv. Throws Error.
std::vector<EvalResult> evaluate(llama::ModelFile& file, EvalOptions o);

}  // namespace turboquant::measure
