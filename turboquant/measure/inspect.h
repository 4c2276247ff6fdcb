// What a model's keys and values look like, what follows from it, and the plan that would be chosen.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "turboquant/llama/session.h"
#include "turboquant/measure/kv_statistics.h"
#include "turboquant/planner/plan.h"

namespace turboquant::measure {

constexpr int kShortestInspected = 16;  ///< tokens

struct InspectOptions {
    std::string text_file{};  ///< empty: the text that ships with the library
    int n_tokens = 512;       ///< at most
    double outlier_ratio = 3;
    double bits = 0;  ///< of a plan; 0: none is made
    int n_threads = 0;
};

struct Inspection {
    std::string model, text;  ///< name and source, in words
    int n_tokens = 0;
    double outlier_ratio = 3;
    std::vector<LayerStatistics> layers;
    double k_norm = 0;  ///< mean over layers
    std::optional<double> v_norm, ratio;
    std::string verdict;
    std::optional<Plan> plan;
};

/// Noise of a uniform format over what tells keys apart, if their constant part is quantized with them: the format's relative mean squared
/// error (at a head size of 128) over 1 - k_offset_share, both in units of the keys' energy.
double key_noise(const LayerStatistics& layer, CodecId codec);

/// What the statistics say about formats, in words: about the keys' constant part, outlier channels, K beside V.
std::string verdict(const std::vector<LayerStatistics>& layers, double outlier_ratio);

/// Throws Error.
Inspection inspect(llama::ModelFile& file, InspectOptions options);

}  // namespace turboquant::measure
