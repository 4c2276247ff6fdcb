// Text to calibrate on: never the text that is evaluated. What ships with the library, a file, or written by the model itself.
#pragma once

#include <cstdint>
#include <span>
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

/// Sequences of at most n_tokens tokens each (fewer if there is less text; a multiple of 64, at least 64), in each as much of every part as its length
/// is of the whole's, so that no kind of text is cut off. The parts are dealt out to the sequences in order. Throws Error if they give too few tokens.
Calibration text_of_parts(const llama_vocab* vocab, std::span<const char* const> parts, int n_sequences, int n_tokens);

/// Lets the model write n_sequences texts of n_tokens tokens each, side by side in one batch, sampled from its own distribution
/// (temperature 1, nothing cut off) from a fixed seed. Ends of text are followed by a new beginning. llama.cpp's own f16 cache. Throws
/// Error.
Calibration generate_text(llama_model* model, int n_sequences, int n_tokens, std::uint32_t seed, int n_threads,
                          const Monitor& monitor = {});

/// Pieces of a text file, spread evenly over it; fewer sequences if the file is short. Throws Error if it has less than n_tokens
/// tokens.
Calibration text_from_file(const llama_vocab* vocab, const std::string& path, int n_sequences, int n_tokens);

}  // namespace turboquant::llama
