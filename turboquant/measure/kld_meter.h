// How far a cache format moves a model's predictions, on a fixed text.
#pragma once

#include <memory>
#include <vector>

#include "turboquant/llama/calibration.h"
#include "turboquant/llama/session.h"
#include "turboquant/measure/logit_file.h"
#include "turboquant/measure/score.h"

namespace turboquant::measure {

/// Holds the reference's logits (in a file) and compares other formats with them, one session at a time.
class KldMeter {
  public:
    /// Runs the reference over the text at once. Scored are the last three quarters of each sequence. n_ctx of the options is ignored. `file`
    /// and `text` must outlive this.
    KldMeter(llama::ModelFile& file, const llama::Calibration& text, const llama::CacheSpec& reference, llama::ContextOptions options);

    /// KL divergence of every scored position, nats. Throws llama::Error if the model does not run or gives numbers that are none.
    std::vector<double> divergences(const llama::CacheSpec& spec);
    MeanError measure(const llama::CacheSpec& spec) { return mean_error(divergences(spec)); }

    std::size_t n_scored() const { return n_scored_ * text_->sequences.size(); }
    /// Memory of the reference's cache.
    const llama::KvMemory& reference_memory() const { return memory_; }

  private:
    template <class Sink>
    llama::KvMemory run(const llama::CacheSpec& spec, Sink&& sink);

    llama::ModelFile* file_;
    const llama::Calibration* text_;
    llama::ContextOptions options_;
    std::size_t n_scored_ = 0;
    std::unique_ptr<LogitFile> logits_;  ///< [sequence][scored position]
    llama::KvMemory memory_;
};

}  // namespace turboquant::measure
