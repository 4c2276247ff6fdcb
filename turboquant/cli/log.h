// llama.cpp's log: silent unless asked for, but what it complained about is kept for our own error messages.
#pragma once

#include <string>

namespace turboquant::cli {

/// From now on llama.cpp's and ggml's log goes to stderr (verbose) or nowhere; warnings and errors are remembered in both cases.
void install_log(bool verbose);

/// The most recent warnings and errors, one per line with indentation, "" if none; forgets them.
std::string take_log_problems();

}  // namespace turboquant::cli
