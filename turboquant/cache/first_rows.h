// The first rows written to a KV tensor, kept in fp16 beside it while its outlier channels (outlier_channels.h) are measured on them. With
// every batch it is measured again and all rows are encoded again, so every cell is always encoded by what is in force, and what is
// measured depends on the rows alone, not on how they were cut into batches. From kFreezeRows rows on it stays as it is (a prompt gets
// there with its first batch), and the rows are dropped.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

class FirstRows {
  public:
    static constexpr std::size_t kFreezeRows = 64;    ///< 64 rows leave the key error 9 % above that of 256
    static constexpr std::size_t kMeasureRows = 256;  ///< at most so many rows of the freezing batch are used

    /// A row exactly as it would be saved (saved_row.h), so that saving and restoring it changes nothing.
    struct Row {
        std::int64_t row;
        std::int32_t pos;                   ///< -1: unknown
        std::vector<std::uint16_t> values;  ///< fp16, model's space; keys after RoPE, tagged with their position
    };

    /// Takes in a batch: n_embd values at x[i*stride] go to row rows[i], position pos[i]. A row written again replaces the old one. Rows of
    /// unknown position only if asked for.
    void add(const float* x, std::size_t stride, std::size_t n_embd, std::span<const std::int64_t> rows, std::span<const std::int32_t> pos,
             bool unknown_too);
    bool enough() const { return rows_.size() >= kFreezeRows; }
    std::span<const Row> rows() const { return rows_; }  ///< ascending
    const Row* find(std::int64_t row) const;
    void clear() { std::vector<Row>().swap(rows_); }

  private:
    std::vector<Row> rows_;
};

}  // namespace turboquant
