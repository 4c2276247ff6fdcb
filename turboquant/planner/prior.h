// Formats within a budget for a model that cannot be measured: in a stock tool the library sees a cache and no text. `turboquant plan`
// does better (docs/planner.md says by how much).
//
// What is assumed instead of measured: divergence is proportional to the squared error of a format, all layers count alike, and keys count more
// than values the deeper the model is. Seen (docs/models.md): in models of 18 to 30 layers keys at one to two bits more than their values are best
// (with both at 4 bits, keys cause 11 times what values cause on Qwen2.5-0.5B), in small ones of 8 layers both sides cost the same at equal bits.
// If the keys' offset is not removed, they count 2.7 times as much again. Where layers with global attention stand among others with sliding
// windows, what goes wrong at low bits is their keys (Gemma-3-270M: in tcq2 each of the three costs 22 to 27 times one of the fifteen others; in
// values, 1.3 times). Of equal choices the outermost layers and the keys get the better format.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/codec/codec.h"

namespace turboquant {

/// The keys or the values of one layer.
struct UnmeasuredSlot {
    Side side = Side::key;
    int head_dim = 0, n_heads = 0;
    std::int64_t n_cells = 1;  ///< beside those of the other layers, in any unit
};

/// The formats that unmeasured_formats chooses from: those with kernels of their own that take at most `bits` + 2.25 bits a value, so that no
/// more than that need be reserved. Head size 128 stands for all. Empty if the budget is below all of them.
std::vector<CodecId> unmeasured_candidates(double bits);

/// What an error in the keys counts beside the same error in the values, in a model of so many layers.
double key_weight(int n_layers, bool offset_removed);

/// A format for every slot (ascending by layer, any order of sides), together at most `bits` per value of all cells with their scales: the
/// choice of least assumed divergence, exact (allocate.h). Layers with more cells than the fewest have global attention. Throws
/// std::invalid_argument if the budget is below what the smallest formats take, or a head size is not supported.
std::vector<CodecId> unmeasured_formats(std::span<const UnmeasuredSlot> slots, double bits, bool offset_removed);

}  // namespace turboquant
