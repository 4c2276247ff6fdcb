// What goes wrong in driving llama.cpp and in measuring.
#pragma once

#include <stdexcept>

namespace turboquant::llama {

/// The text says the cause and what to do about it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace turboquant::llama
