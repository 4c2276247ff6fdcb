// What attention over one stream of a cache needs to know that depends on mask and positions alone: which offsets are visible, which rows
// are exact for which query, and the mask of either part. All layers of a cache share it, so it is made once per graph (StepPlans).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/cache/exact_rows.h"
#include "turboquant/cache/positions.h"
#include "turboquant/cache/step_cells.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {

struct StepPlan : StepCells {
    std::uint64_t number = 0;  ///< of all plans of a StepPlans: the low 16 bits number those of a graph, from 0 on; no plan has 0

    /// Exact rows that some query wants, in the order of their positions, residuals in that of their cells: what slots they lie in must not
    /// decide in what order is summed.
    std::vector<std::int32_t> k_slots, v_slots, exact_cells, exact_positions;
    std::vector<std::uint16_t> exact_mask;  ///< [n_tokens][heads][rows]: ExactRowsView::mask
    std::vector<std::int16_t> tile_patch;   ///< MaskPatch::tile, empty if no row is exact, or what is kept of them are residuals
    std::vector<std::uint16_t> patches;     ///< MaskPatch::halves: exact cells hidden

    /// Sets patch and exact of a call (but for the queries), if any row is exact.
    void set_exact(AttentionArgs& a) const;
};

/// What becomes of a plan for a store: TileStore::exact_in_pairs, has_masks, see_cells.
struct PlanFor {
    bool in_pairs = false, has_masks = false;
    SeeCells see{};  ///< where the host has no mask that it can read
};

/// Plans of the graph that runs, by cache and mask. Kept from graph to graph for their memory only.
class StepPlans {
  public:
    /// Masks and positions may be other ones from now on.
    void begin_graph() { n_valid_ = 0, graph_++; }

    /// The plan of a call over a stream. `k`, `v`: exact rows of keys and values, or null (v also if the values are the keys); layers whose
    /// rows lie in the same slots share a plan. `with_offsets`: ids and cells are wanted. Valid until the next call of a method; what its vectors hold, until the next graph.
    const StepPlan& find(Executor& executor, const StepMask& m, const CellPositions& cells, const ExactRows* k, const ExactRows* v,
                         bool with_offsets, const PlanFor& store = {});

  private:
    struct Entry {
        StepMask mask;
        const CellPositions* cells = nullptr;
        std::uint64_t version = 0;  ///< of the cells
        bool with_offsets = false, with_windows = false, in_pairs = false, has_masks = false;
        WindowSizes windows;
        std::vector<std::int64_t> k_rows, v_rows;  ///< by slot
        StepPlan plan;
    };
    std::vector<Entry> entries_;
    std::size_t n_valid_ = 0;
    std::uint64_t graph_ = 1;
};

}  // namespace turboquant
