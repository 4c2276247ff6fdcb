// What the command shows of work under way, on stderr.
#pragma once

#include "turboquant/llama/monitor.h"

namespace turboquant::cli {

/// Log lines as they are; progress as a bar with the time left, drawn only if stderr is a terminal and at most ten times a second, erased
/// at the end.
llama::Monitor terminal_monitor();

}  // namespace turboquant::cli
