// Text that ships with the library, to look at models with. Real text of several kinds: what a model writes itself may be caught in a loop, and such a
// text says little of how its heads behave on others (docs/planner.md).
#pragma once

#include <span>

namespace turboquant::llama {

/// A story, code, a conversation, a manual. UTF-8.
std::span<const char* const> calibration_parts();
/// To test on what was found on those: a letter, other code, an interview.
std::span<const char* const> held_out_parts();

}  // namespace turboquant::llama
