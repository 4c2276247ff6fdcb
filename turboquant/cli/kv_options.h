// Options that several subcommands have.
#pragma once

#include <string>

#include "turboquant/cli/command.h"
#include "turboquant/llama/session.h"

namespace CLI {
class App;
}

namespace turboquant::cli {

/// --sink and --recent: exact windows of all formats of ours.
void add_window_options(CLI::App& command, WindowSizes& windows);

/// --weights and --weights-file.
struct WeightOptions {
    bool f16 = false;
    std::string file{};
};
void add_weight_options(CLI::App& command, WeightOptions& weights);

/// --gpu-layers (-ngl) and --gpu-backend.
struct GpuOptions {
    int n_layers = llama::kAllThatCan;
    std::string backend{};
};
void add_gpu_options(CLI::App& command, GpuOptions& gpu);

/// The model, with what the user is shown of the work on it. Throws llama::Error.
llama::ModelFile open_model(const std::string& path, const GlobalOptions& global, const GpuOptions& gpu, const WeightOptions& weights = {},
                            int n_threads = 0);

}  // namespace turboquant::cli
