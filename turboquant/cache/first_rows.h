// The first rows written to a KV tensor, kept in fp16 beside it while its outlier channels (outlier_channels.h) are measured on them. With
// every batch it is measured again and all rows are encoded again, so every cell is always encoded by what is in force, and what is
// measured depends on the rows alone, not on how they were cut into batches. From kFreezeRows rows on it stays as it is (a prompt gets
// there with its first batch), and the rows are dropped.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/kept_row.h"

namespace turboquant {

class FirstRows {
  public:
    static constexpr std::size_t kFreezeRows = 64;    ///< 64 rows leave the key error 9 % above that of 256
    static constexpr std::size_t kMeasureRows = 256;  ///< at most so many rows of the freezing batch are used

    /// Takes in a batch: n_embd values at x[i*stride] go to row rows[i]. A row written again replaces the old one.
    void add(const float* x, std::size_t stride, std::size_t n_embd, std::span<const std::int64_t> rows);
    bool enough() const { return rows_.size() >= kFreezeRows; }
    std::span<const KeptRow> rows() const { return rows_; }  ///< ascending
    const KeptRow* find(std::int64_t row) const;
    void clear() { std::vector<KeptRow>().swap(rows_); }

  private:
    std::vector<KeptRow> rows_;
};

}  // namespace turboquant
