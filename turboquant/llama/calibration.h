// Text to calibrate on: never the text that is evaluated. Written by the model itself, so it fits any model and language and no corpus
// ships, or a file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "llama.h"
#include "turboquant/llama/monitor.h"

namespace turboquant::llama {

struct Calibration {
    std::string source;                               ///< in words
    std::vector<std::vector<llama_token>> sequences;  ///< all of one length

    std::size_t n_tokens() const { return sequences.empty() ? 0 : sequences.size() * sequences[0].size(); }
};

/// Lets the model write n_sequences texts of n_tokens tokens each, side by side in one batch, sampled from its own distribution
/// (temperature 1, nothing cut off) from a fixed seed. Ends of text are followed by a new beginning. llama.cpp's own f16 cache. Throws
/// Error.
Calibration generate_text(llama_model* model, int n_sequences, int n_tokens, std::uint32_t seed, int n_threads,
                          const Monitor& monitor = {});

/// Pieces of a text file, spread evenly over it; fewer sequences if the file is short. Throws Error if it has less than n_tokens
/// tokens.
Calibration text_from_file(const llama_vocab* vocab, const std::string& path, int n_sequences, int n_tokens);

}  // namespace turboquant::llama
