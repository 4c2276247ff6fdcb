// Logits of a reference run, kept in a temporary file: those of 1024 positions of a model of 152,000 tokens are 600 MB.
#pragma once

#include <cstddef>
#include <span>

#include "turboquant/llama/temporary_file.h"

namespace turboquant::measure {

/// Rows of n_vocab floats.
class LogitFile {
  public:
    /// Throws llama::Error if no temporary file can be made.
    LogitFile(std::size_t n_rows, std::size_t n_vocab);

    std::size_t n_vocab() const { return n_vocab_; }
    /// One or more whole rows, from `row` on. Throws llama::Error if the disk is full.
    void write(std::size_t row, std::span<const float> logits);
    /// One row; false if it cannot be read, or was never written. May be called from many threads at once.
    bool read(std::size_t row, std::span<float> logits) const;

  private:
    std::size_t n_rows_, n_vocab_;
    llama::TemporaryFile file_;
};

}  // namespace turboquant::measure
