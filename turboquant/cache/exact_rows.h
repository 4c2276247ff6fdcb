// Exact windows: the first tokens (sink) and the most recent ones of each sequence, kept better than the compressed cache has them: what
// their codes leave, in 4 bits, or all of them in fp16 (WindowForm).
//
// Every row is compressed when it is written, as without windows; of those that some query may want exactly a store holds that beside it, in
// slots (tile_store.h), and ExactRows says which row lies in which slot. A query at position p sees as exact the cells at positions < sink and
// > p - recent that its mask shows, its own among them, and all others compressed (step_plan.h), so it does not matter how a prompt was cut
// into batches: the rows of a batch stay in the store until attention over them is done, then those that left the windows go (trim).
//
// What a cell's position is, and which sequence it belongs to, CellPositions says. Sequences that branch off from each other share an
// offset id, and so one window, which the branch that is ahead moves; a sequence cut back by more than one token finds the tokens before
// the cut compressed: exactness is lost then, nothing else.
//
// Of fp16 windows: what stays of a batch is rounded before it is compressed, too (kept_by_batch), so that a saved exact row tells both forms.
// Of residuals: each stands on the code that its row has at that moment, and is only worth something with it. Whoever writes other codes
// writes it again (encode_kept, rotate), or forgets the row.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/cache/positions.h"
#include "turboquant/codec/codec.h"
#include "turboquant/spec/windows.h"

namespace turboquant {

/// Rounds a row to the fp16 values that are stored, of keys without the bits that a tag takes (saved_row.h).
void round_row(Side side, std::span<float> x);

/// A slot takes over the row of another.
struct SlotMove {
    std::int32_t from, to;
};

/// Which rows of one KV tensor are exact, and in which slot of its store each lies. All streams together: a row of the cache is stream *
/// n_cells + cell.
class ExactRows {
  public:
    /// Windows of at most so many sequences (or streams, if there are more) are kept, those written last.
    static constexpr int kMaxSequences = 8;

    /// `row_bytes`: of a slot (Layout::window_row_bytes). `spare`: slots that may stay free (TileStore::spare_exact_slots).
    ExactRows(WindowSizes windows, std::size_t row_bytes, std::int64_t n_cells, std::int64_t n_streams, std::size_t spare = 0)
        : windows_(windows), row_bytes_(row_bytes), n_cells_(n_cells), n_streams_(n_streams), spare_(spare) {}

    const WindowSizes& windows() const { return windows_; }

    /// Of a batch that was just placed: out[i] says whether row rows[i] may stay after trim(), and so is rounded before it is written.
    void kept_by_batch(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::uint8_t>& out) const;
    /// Takes in a batch: slots[i] is that of rows[i], or -1. A token at position p ends what was kept of its sequence from p on: it was cut
    /// back. Rows of unknown position are not kept.
    void add(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::int32_t>& slots);
    /// The first of that alone: drops what the batch ends.
    void make_way(std::span<const std::int64_t> rows, const CellPositions& cells);
    /// Takes in a restored row, in any order; returns its slot.
    std::int32_t put(std::int64_t row);
    /// Drops what no later query can want. The moves close the slots up where too many are free, in this order; then there are
    /// slots().size() of them.
    std::span<const SlotMove> trim(const CellPositions& cells);
    /// Forgets rows whose compressed form was replaced (restored state).
    void forget(std::int64_t first, std::int64_t n);
    void clear() { resize(0); }
    /// As KvTensor::copy_stream; the moves are copies.
    std::span<const SlotMove> copy_stream(std::int64_t src, std::int64_t dst);

    /// Drops rows that are not in `slots`, another side's, and puts the others where it has them. Moves of the first list, then of the second.
    struct Arrangement {
        std::vector<SlotMove> out, in;
    };
    Arrangement arrange(std::span<const std::int64_t> slots);

    /// Slot -> row, -1 where the slot is free.
    std::span<const std::int64_t> slots() const { return slots_; }
    /// The slot of a row, or -1 if it is not kept.
    std::int32_t find(std::int64_t row) const;
    /// The same of rows first..first+n-1.
    std::vector<std::int32_t> find(std::int64_t first, std::int64_t n) const;

    /// Bytes now (any thread may ask), and with all windows full (as many sequences as there are streams).
    std::size_t bytes() const { return n_slots_.load(std::memory_order_relaxed) * row_bytes_; }
    std::size_t full_bytes() const {
        return static_cast<std::size_t>(std::min<std::int64_t>(windows_.sink + windows_.recent, n_cells_) * n_streams_) * row_bytes_;
    }

  private:
    /// Stream and offset id: a copy of a stream keeps its offset ids.
    std::int64_t sequence(std::int64_t row, const CellPositions& cells) const {
        return row / n_cells_ * CellPositions::kMaxOffsets + cells.offset_id(row);
    }
    /// Slots as they were, what was done with them, and what came of it.
    struct Step {
        std::uint64_t cells = 0, version = 0;
        WindowSizes windows;
        std::int64_t n_streams = 0;
        std::size_t spare = 0;
        std::vector<std::int64_t> rows, slots_before, slots_after;
        std::vector<std::uint64_t> written_before, written_after;
        std::uint64_t clock_before = 0;
        std::vector<std::int32_t> taken;
        std::vector<SlotMove> moves;
    };
    struct Steps;
    template <class Do>
    const Step& once(Steps& steps, const CellPositions& cells, std::span<const std::int64_t> rows, Do&& act);
    void add_now(std::span<const std::int64_t> rows, const CellPositions& cells, std::vector<std::int32_t>& slots);
    void trim_now(const CellPositions& cells, std::vector<SlotMove>& moves);
    std::int32_t take_slot(std::int64_t row, std::size_t from);
    void resize(std::size_t n_slots);

    WindowSizes windows_;
    std::size_t row_bytes_;
    std::int64_t n_cells_, n_streams_;
    std::size_t spare_;
    std::vector<std::int64_t> slots_;
    std::atomic<std::size_t> n_slots_ = 0;  ///< of slots_, for those who look on
    std::vector<std::uint64_t> written_;    ///< time at which a slot was written
    std::uint64_t clock_ = 0;
    std::vector<SlotMove> moves_;
};

}  // namespace turboquant
