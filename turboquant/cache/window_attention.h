// Attention over a cache with exact windows (exact_rows.h): one call over the compressed cells, in whose mask the exact ones are hidden,
// one over the exact rows, and the two results merged.
#pragma once

#include <cstdint>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/cache/exact_rows.h"

namespace turboquant {

class WindowAttention {
  public:
    /// Divides a call over stream `stream` of a cache. True: run `compressed()` and `exact()`, then merge(). False: no query wants an exact
    /// row, run `a` as it is. `v` is null if the values are the keys (MLA). Reused from call to call, to keep its memory; `a`, the rows and
    /// this object must live until merge().
    bool split(const AttentionArgs& a, const ExactRows& k, const ExactRows* v, const CellPositions& cells, std::int64_t stream);

    /// The queries of exact(), where compressed keys are asked with others (KeyOffset::scale_query).
    void set_exact_queries(const float* q, std::size_t token_stride, std::size_t head_stride) {
        exact_.q = q, exact_.q_token_stride = token_stride, exact_.q_head_stride = head_stride;
    }

    const AttentionArgs& compressed() const { return compressed_; }
    const AttentionArgs& exact() const { return exact_; }
    /// Part `ith` of n.
    void merge(int ith, int n) const;

  private:
    AttentionArgs compressed_, exact_;
    std::vector<std::uint8_t> k_tiles_, v_tiles_;
    std::vector<std::uint16_t> compressed_mask_, exact_mask_;
    std::vector<float> lse_, exact_lse_, exact_out_;
};

}  // namespace turboquant
