// Formats within a budget for a model that cannot be measured: in a stock tool the library sees a cache and no text. `turboquant plan`
// does better (docs/planner.md says by how much).
//
// What is assumed instead of measured: divergence is proportional to the squared error of a format, all layers count alike, and keys count
// as much as values if their offset is removed, 2.7 times as much if it is not (measured at 3 bits, offset removed: keys .0065, values
// .0091; not removed: .025; the first is rounded up because keys are the more dangerous side). Of equal choices the outermost layers and
// the keys get the better format.
#pragma once

#include <span>
#include <vector>

#include "turboquant/codec/codec.h"

namespace turboquant {

/// The keys or the values of one layer.
struct UnmeasuredSlot {
    Side side = Side::key;
    int head_dim = 0, n_heads = 0;
};

/// The formats that unmeasured_formats chooses from: those with kernels of their own that take at most `bits` + 2 bits a value, so that no
/// more than that need be reserved. Head size 128 stands for all. Empty if the budget is below all of them.
std::vector<CodecId> unmeasured_candidates(double bits);

/// A format for every slot (ascending by layer, any order of sides), together at most `bits` per value with their scales: the choice of
/// least assumed divergence, exact. Throws std::invalid_argument if the budget is below what the smallest formats take, or a head size is
/// not supported.
std::vector<CodecId> unmeasured_formats(std::span<const UnmeasuredSlot> slots, double bits, bool offset_removed);

}  // namespace turboquant
