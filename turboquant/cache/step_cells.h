// What attention over one stream of a cache needs to know of its cells: positions, and which of the key offsets belongs to each.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "turboquant/cache/positions.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {

/// The mask of one call over one stream, and what it says, by AttentionArgs' conventions.
struct StepMask {
    const void* id = nullptr;  ///< StreamQuery::mask_id
    const std::uint16_t* mask = nullptr;
    std::size_t token_stride = 0, head_stride = 0;
    int heads = 1, n_tokens = 0, n_kv = 0;
    std::int64_t stream = 0;

    friend bool operator==(const StepMask&, const StepMask&) = default;
};

/// seen[j] != 0: some query of the mask sees cell j. Where the host cannot read the mask; else none.
using SeeCells = std::function<void(const StepMask&, std::vector<std::uint16_t>& seen)>;

class StepCells {
  public:
    /// Offset ids of the cells that some query sees (ScoreTerm). Cells of ended sequences keep their ids until they are overwritten, so
    /// only the mask tells.
    std::vector<int> ids;
    std::vector<std::int32_t> cell_pos;   ///< [n_kv]: ScoreTerm::cell_pos
    std::vector<std::uint8_t> cell_term;  ///< [n_kv]: index into ids
    std::uint64_t cells_number = 0;       ///< of what cell_pos and cell_term hold: another number with other contents

    /// Makes it that of a call. Of single tokens only what changed since the call before is looked at: a step of decoding writes one cell
    /// and shows it, and as that stands where it was expected (hidden cells go on from their neighbours), nothing else comes of it.
    void set(Executor& executor, const StepMask& m, const CellPositions& cells, const SeeCells& see = {});

  private:
    bool follow(const StepMask& m, const CellPositions& cells);
    bool find_changes(const StepMask& m, const CellPositions& cells);
    void set_all(const StepMask& m, const CellPositions& cells, const std::vector<std::uint16_t>& seen);

    // Of the call before, if it was of a single token.
    const CellPositions* cells_ = nullptr;
    std::uint64_t serial_ = 0, version_ = 0;
    std::int64_t stream_ = -1;
    std::vector<std::uint16_t> mask_;  ///< empty: none
    std::vector<int> tiles_;           ///< that changed
};

}  // namespace turboquant
