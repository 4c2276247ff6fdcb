// Which format for which part of the cache: the choice of one option per slot that costs least within a budget.
//
// A slot is the keys or the values of one layer. Quantization errors of slots add up in KL divergence (docs/planner.md), so the whole is a
// multiple-choice knapsack problem, and small enough to be solved exactly: dynamic programming over sizes (Dudzinski and Walukiewicz 1987).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace turboquant {

/// One way to store a slot.
struct SlotOption {
    std::int64_t size = 0;  ///< in any unit that is the same for all slots, e.g. bytes of 64 tokens; >= 0
    double cost = 0;        ///< predicted loss, finite
};

struct Allocation {
    std::vector<std::size_t> choice;  ///< index into each slot's options
    std::int64_t size = 0;            ///< sum over the slots, <= budget
    double cost = 0;                  ///< sum over the slots
};

/// Minimizes the summed cost over all choices whose summed size is at most `budget`; exactly, unless sizes have so small a common divisor
/// that they are rounded up to 1/65536 of the room for the search, which may leave that much of it unused per slot. Of equal costs the
/// smaller size wins. Time and memory: slots * options * (budget above the least possible, in units of the sizes' common divisor, at most
/// 65536). Throws std::invalid_argument if a slot has no options, a cost is not finite, a size is negative, or the budget is below the
/// least possible size.
Allocation allocate(std::span<const std::vector<SlotOption>> slots, std::int64_t budget);

}  // namespace turboquant
