// Exact windows: the first tokens (sink) and the most recent ones of each sequence, kept in fp16 beside the compressed cache.
//
// Every row is compressed when it is written, as without windows; the store below holds a copy of those that some query may want exactly. A
// query at position p sees as exact the cells at positions < sink and > p - recent that its mask shows, its own among them, and all others
// compressed, so it does not matter how a prompt was cut into batches: the rows of a batch stay in the store until attention over them is
// done, then those that left the windows go (trim). Attention takes the two parts apart and merges them by their log-sum-exp
// (window_attention.h).
//
// What a cell's position is, and which sequence it belongs to, CellPositions says. Sequences that branch off from each other share an
// offset id, and so one window, which the branch that is ahead moves; a sequence cut back by more than one token finds the tokens before
// the cut compressed: exactness is lost then, nothing else.
//
// What stays of a batch is rounded to fp16 before it is compressed, too (round), so that a saved exact row tells both forms.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "turboquant/cache/positions.h"
#include "turboquant/cache/rope.h"
#include "turboquant/codec/codec.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/spec/windows.h"

namespace turboquant {

/// Rounds a row to the fp16 values that are stored, of keys without the bits that a tag takes (saved_row.h).
void round_row(Side side, std::span<float> x);

/// The exact rows of one KV tensor. All streams together: a row of the cache is stream * n_cells + cell.
class ExactRows {
  public:
    /// Windows of at most so many sequences (or streams, if there are more) are kept, those written last.
    static constexpr int kMaxSequences = 8;

    ExactRows(WindowSizes windows, Side side, int n_head, int head_dim, std::int64_t n_cells, std::int64_t n_streams)
        : windows_(windows), side_(side), n_head_(n_head), head_dim_(head_dim), n_cells_(n_cells), n_streams_(n_streams) {}

    const WindowSizes& windows() const { return windows_; }
    Side side() const { return side_; }
    int n_head() const { return n_head_; }
    int head_dim() const { return head_dim_; }

    /// A batch that was just placed, to compress and to add: x[i*stride ..+n_embd) is row rows[i], out[i*n_embd ..) the same, those rows
    /// rounded that may stay here after trim().
    void round(const float* x, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells,
               std::vector<float>& out) const;
    /// Takes in a batch, as round() left it (x[i*n_embd]). A token at position p ends what was kept of its sequence from p on: it was cut
    /// back. Rows of unknown position are not kept.
    void add(const Kernels& k, const float* x, std::span<const std::int64_t> rows, const CellPositions& cells);
    /// Takes in a restored row, in any order.
    void put(const Kernels& k, const float* x, std::int64_t row);
    /// Drops what no later query can want.
    void trim(const CellPositions& cells);
    /// Forgets rows whose compressed form was replaced (restored state).
    void forget(std::int64_t first, std::int64_t n);
    void clear();
    /// As KvTensor::copy_stream.
    void copy_stream(std::int64_t src, std::int64_t dst);
    /// Rotates the kept rows by shift[row], each by its own RoPE table (context shift).
    void rotate(const RopeParams& rope, std::span<const std::int32_t> shift);

    /// Slot -> row, -1 where the slot is free.
    std::span<const std::int64_t> slots() const { return slots_; }
    /// fp16 values of a slot.
    std::span<const std::uint16_t> values(std::size_t slot) const { return std::span(values_).subspan(slot * n_embd(), n_embd()); }
    /// The values of a row, or none if it is not kept.
    std::optional<std::vector<float>> find(std::int64_t row) const;

    /// Bytes now, and with all windows full (as many sequences as there are streams).
    std::size_t bytes() const { return values_.size() * sizeof(std::uint16_t); }
    std::size_t full_bytes() const;

  private:
    using Sequence = std::pair<std::int64_t, int>;  ///< stream and offset id: a copy of a stream keeps its offset ids
    Sequence sequence(std::int64_t row, const CellPositions& cells) const { return {row / n_cells_, cells.offset_id(row)}; }
    std::size_t n_embd() const { return static_cast<std::size_t>(n_head_) * head_dim_; }
    std::uint16_t* at(std::size_t slot) { return values_.data() + slot * n_embd(); }
    std::size_t take_slot(std::int64_t row, std::size_t from);
    void resize(std::size_t n_slots);

    WindowSizes windows_;
    Side side_;
    int n_head_, head_dim_;
    std::int64_t n_cells_, n_streams_;
    std::vector<std::int64_t> slots_;
    std::vector<std::uint64_t> written_;  ///< time at which a slot was written
    std::uint64_t clock_ = 0;
    std::vector<std::uint16_t> values_;  ///< [slot][n_head][head_dim]
};

}  // namespace turboquant
