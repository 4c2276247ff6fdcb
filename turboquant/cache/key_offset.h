// Key offset removal: what is stored is k - R(p) mu, with mu the mean of a layer's keys per KV head before RoPE and R(p) the model's own
// RoPE at the key's position p. It costs no bits, and attention adds q . R(p) mu back to each score exactly (attention/attention.h,
// KeyTerm). Source: our measurement, docs/quality.md; subtracting one fixed vector from all keys leaves softmax unchanged, and keys have a
// constant part before RoPE.
//
// mu is measured on the first keys written (first_rows.h), and then frozen.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/first_rows.h"
#include "turboquant/cache/rope.h"

namespace turboquant {

class KeyOffset {
  public:
    KeyOffset(int n_head, int head_dim) : n_head_(n_head), head_dim_(head_dim), mu_(static_cast<std::size_t>(n_head) * head_dim) {}

    /// RoPE of this layer; freq_factors are copied. Without it the offset is the plain mean (models without RoPE).
    void set_rope(const RopeParams& rope);
    bool has_rope() const { return has_rope_; }
    const RopeParams& rope() const { return rope_; }

    bool frozen() const { return frozen_; }
    std::span<const float> mu() const { return mu_; }  ///< [n_head][head_dim], fp16 values
    std::vector<std::uint16_t> mu_halves() const;
    void freeze() { frozen_ = true; }
    void freeze(std::span<const std::uint16_t> mu);
    /// Forgets mu (the cache was emptied).
    void reset();

    /// Measures mu on rows of keys; those of unknown position are left out. Does nothing once frozen.
    void measure(std::span<const FirstRows::Row> rows);

    /// Frequencies of the score term q . R(p) mu = sum_i a_i cos(p w_i) + b_i sin(p w_i): RoPE's, and one of zero for the dims that RoPE
    /// leaves alone.
    int n_freq() const { return (has_rope_ ? rope_.n_dims / 2 : 0) + (!has_rope_ || rope_.n_dims < head_dim_); }
    /// a_0.., b_0.. (2*n_freq floats) of one query vector for KV head `head`.
    void query_terms(std::span<const float> q, int head, std::span<float> terms) const;
    /// cos(p w_0).., sin(p w_0).. (2*n_freq floats, YaRN's magnitude included).
    void trig_row(std::int32_t pos, std::span<float> row) const;

    /// x -= R(pos) mu for one row (all heads); nothing if pos < 0. `sign` -1 adds instead.
    void remove(std::span<float> x, std::int32_t pos, float sign = 1) const;

  private:
    int n_head_, head_dim_;
    std::vector<float> mu_;
    bool frozen_ = false, has_rope_ = false;
    RopeParams rope_;
    std::vector<float> freq_factors_;
};

}  // namespace turboquant
