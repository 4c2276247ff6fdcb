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

/// The model, with what the user is shown of the work on it. Throws llama::Error.
llama::ModelFile open_model(const std::string& path, const GlobalOptions& global);

}  // namespace turboquant::cli
