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

/// This row's mean KLD less another's, on the same positions.
struct Comparison {
    std::string other;
    MeanError difference;
};

struct EvalResult {
    llama::CacheSpec spec;
    llama::KvMemory memory;
    ScoreSummary score;
    std::optional<Plan> plan{};  ///< of auto: and of plan files
    /// Not asked for: what different rounding alone does (f16 rows in our cache) where weights are quantized.
    bool floor = false;
    /// With the best other row that takes no more bits, if there is one (f16, the floor and what is f16 by another name aside).
    std::optional<Comparison> best_other{};
};

/// All formats on the same chunks, in the order of o.kv; after them the floor, where weights are quantized and a format of ours is asked for.
/// Memory: the model, one context, and one chunk's reference logits in a file. Throws llama::Error.
std::vector<EvalResult> evaluate(llama::ModelFile& file, EvalOptions o);

/// The floor, if it is among the rows.
const EvalResult* floor_of(const std::vector<EvalResult>& results);

}  // namespace turboquant::measure
