#include "turboquant/cli/kv_options.h"

#include <map>
#include <string>

#include "CLI/CLI.hpp"
#include "turboquant/cli/terminal.h"

namespace turboquant::cli {

void add_window_options(CLI::App& command, WindowSizes& windows) {
    command.add_option("--sink", windows.sink, "First tokens that stay exact, for all formats of ours (default: up to 4)")
        ->check(CLI::Range(0, 65536));
    command
        .add_option(
            "--recent", windows.recent,
            "Most recent tokens that stay exact, both in f16 (default: with --sink 1/16 bit per value, as 4 bits on top of the codes; "
            "recent=N:4 in a SPEC)")
        ->check(CLI::Range(0, 65536));
}

void add_weight_options(CLI::App& command, WeightOptions& weights) {
    command
        .add_option(
            "--weights", weights.f16,
            "as-is, or f16: the same weights dequantized, so that llama.cpp's rounding of activations does not drown what the cache does")
        ->transform(CLI::CheckedTransformer(std::map<std::string, bool>{{"as-is", false}, {"f16", true}}));
    command.add_option("--weights-file", weights.file,
                       "With --weights f16: file to keep those weights in, and to take them from (default: a temporary one)");
}

void add_gpu_options(CLI::App& command, GpuOptions& gpu) {
    command
        .add_option(
            "--gpu-layers,--n-gpu-layers", gpu.n_layers,
            "Layers on the GPU, weights and cache, the last ones first (also -ngl); 0: all on the CPU (default: all, where there is "
            "a GPU)")
        ->check(CLI::Range(0, 1 << 20))
        ->default_str("");
    command.add_option("--gpu-backend", gpu.backend, "llama.cpp's libggml-cuda.so (default: where ggml's libraries are)");
}

llama::ModelFile open_model(const std::string& path, const GlobalOptions& global, const GpuOptions& gpu, const WeightOptions& weights,
                            int n_threads) {
    if (!weights.file.empty() && !weights.f16) throw CommandError("--weights-file goes with --weights f16");
    return {path,
            {.backend_path = global.backend_path,
             .gpu_backend = gpu.backend,
             .n_gpu_layers = gpu.n_layers,
             .monitor = terminal_monitor(),
             .f16_weights = weights.f16,
             .weights_file = weights.file,
             .n_threads = n_threads}};
}

}  // namespace turboquant::cli
