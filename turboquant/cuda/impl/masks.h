// Bodies of the kernels of masks.h: one value each, no words between threads, so that the host runs them as they are.
#pragma once

#include "turboquant/attention/attention.h"
#include "turboquant/cuda/impl/simt.h"
#include "turboquant/cuda/masks.h"

namespace turboquant::cuda {

/// A query's mask, or null. row: of all sequences.
TQ_DEVICE const std::uint16_t* mask_of(const WindowMasks& a, int row) {
    const int seq = row / a.n_tokens;
    return a.mask ? a.mask + seq * a.seq_stride + (row - seq * a.n_tokens) * a.token_stride : nullptr;
}

/// The position of the row in a slot if the query sees it, else -1.
TQ_DEVICE std::int32_t seen_position(const WindowMasks& a, int row, int slot) {
    const std::size_t at = static_cast<std::size_t>(row / a.n_tokens) * a.n_slots + slot;
    const std::uint16_t* mask = mask_of(a, row);
    const int cell = a.cells[at];
    return cell >= 0 && (!mask || mask[cell] != kMaskHidden) ? a.positions[at] : -1;
}

TQ_DEVICE std::uint16_t cell_value(const WindowMasks& a, int row, int cell) {
    const std::uint16_t* mask = mask_of(a, row);
    return cell >= a.n_kv ? kMaskHidden : mask ? mask[cell] : std::uint16_t{0};
}

/// The value of a slot for a query at position `own`; the cell of a row that is wanted is hidden among the cells, which were copied before.
TQ_DEVICE void take_slot(const WindowMasks& a, int row, std::int32_t own, int slot) {
    const std::int32_t pos = seen_position(a, row, slot);
    std::uint16_t value = kMaskHidden;
    if (pos >= 0 && (pos < a.sink || pos > own - a.recent)) {
        const int cell = a.cells[static_cast<std::size_t>(row / a.n_tokens) * a.n_slots + slot];
        value = cell_value(a, row, cell);
        a.out[row * a.out_stride + cell] = kMaskHidden;
    }
    const std::size_t at = static_cast<std::size_t>(row) * a.n_slots + slot;
    a.exact[at] = value;
    if (!a.n_new) return;
    for (int i = 0; i < a.n_new; ++i)
        if (a.new_slots[i] == slot) a.fresh[static_cast<std::size_t>(row) * a.n_new + i] = value, value = kMaskHidden;
    a.old[at] = value;
}

}  // namespace turboquant::cuda
