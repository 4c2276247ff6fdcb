// Outlier channels of one KV tensor: which channels of a head hold so much more energy than the others that they need more bits.
// Source: our measurement on Qwen2.5 (docs/outliers.md): channels with an RMS above 3 times the head's median, in 8 bits; TurboQuant,
// arXiv:2504.19874, sec. 4.3: a fixed share of the channels, those with the largest RMS.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/codec/codec.h"

namespace turboquant {

class OutlierChannels {
  public:
    /// For Family::outliers, channels above `ratio` times the median RMS of their head; for Family::split, a quarter of the channels.
    OutlierChannels(CodecId codec, int n_head, int head_dim, float ratio);

    /// rows: n times [n_head][head_dim], as they are quantized (key offset removed). The heads of a tensor have the same number of outlier
    /// channels, as they share a layout: the mean of what they would have alone, rounded down; each its own channels.
    void measure(std::span<const float> rows);
    int count() const { return count_; }                          ///< per head
    std::span<const std::uint8_t> mask() const { return mask_; }  ///< [n_head][head_dim]
    std::span<const std::uint8_t> mask(int head) const {
        return std::span(mask_).subspan(static_cast<std::size_t>(head) * head_dim_, head_dim_);
    }

    bool frozen() const { return frozen_; }
    void freeze() { frozen_ = true; }
    /// Forgets what was measured: the first channels, as many as there must be.
    void reset();

  private:
    void mark(std::span<const double> energy, int count);

    int n_head_, head_dim_;
    float ratio_;  ///< 0: a fixed share
    int count_ = 0;
    bool frozen_ = false;
    std::vector<std::uint8_t> mask_;  ///< [n_head][head_dim]
};

}  // namespace turboquant
