#include "turboquant/cli/kv_options.h"

#include "CLI/CLI.hpp"
#include "turboquant/cli/terminal.h"

namespace turboquant::cli {

void add_window_options(CLI::App& command, WindowSizes& windows) {
    command.add_option("--sink", windows.sink, "First tokens that stay in f16, too, for all formats of ours (default: up to 4)")
        ->check(CLI::Range(0, 65536));
    command.add_option("--recent", windows.recent, "Most recent tokens that do (default: with --sink 1/256 of the context)")
        ->check(CLI::Range(0, 65536));
}

llama::ModelFile open_model(const std::string& path, const GlobalOptions& global) {
    return {path, {.backend_path = global.backend_path, .monitor = terminal_monitor()}};
}

}  // namespace turboquant::cli
