// llama.cpp's log: silent unless asked for, but what it complained about is kept for our own error messages.
#pragma once

#include <string>

namespace turboquant::llama {

/// From now on llama.cpp's and ggml's log goes to `show`, as it comes, or if that is null nowhere; warnings and errors are remembered in
/// both cases.
void install_log(void (*show)(const char* text) = nullptr);

/// The most recent warnings and errors, one per line with indentation, "" if none; forgets them.
std::string take_log_problems();

}  // namespace turboquant::llama
