// How far a cache format moves a model's predictions, on a fixed text.
#pragma once

#include <vector>

#include "turboquant/llama/calibration.h"
#include "turboquant/llama/session.h"

namespace turboquant::measure {

/// Mean KL divergence with its standard error over tokens, nats.
struct Divergence {
    double mean = 0, error = 0;
};

/// Holds the reference's logits and compares other formats with them, one session at a time.
class KldMeter {
  public:
    /// Runs the reference over the text at once. Scored is the later part of each sequence: its last three quarters, or as much as 512 MiB
    /// of logits allow. n_ctx of the options is ignored. `file` and `text` must outlive this.
    KldMeter(llama::ModelFile& file, const llama::Calibration& text, const llama::CacheSpec& reference, llama::ContextOptions options);

    /// Throws Error if the model does not run or gives numbers that are none.
    Divergence measure(const llama::CacheSpec& spec);
    std::size_t n_scored() const { return n_scored_ * text_->sequences.size(); }
    /// Memory of the reference's cache.
    const llama::KvMemory& reference_memory() const { return memory_; }

  private:
    template <class Sink>
    llama::KvMemory run(const llama::CacheSpec& spec, Sink&& sink);

    llama::ModelFile* file_;
    const llama::Calibration* text_;
    llama::ContextOptions options_;
    std::size_t n_vocab_ = 0, n_scored_ = 0;
    std::vector<float> logits_;  ///< [sequence][scored position][vocabulary]
    llama::KvMemory memory_;
};

}  // namespace turboquant::measure
