// What a GPU works out of a mask for all layers that share it, where it lies: which cells are seen at all, and who sees which rows of exact
// windows. Raw pointers, nothing allocated, capturable, as encode.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

/// Cells that some of n_tokens queries see, 64 to a word: word i has cell 64 i in its lowest bit. mask[t*token_stride + cell], fp16.
struct SeeCells {
    const std::uint16_t* mask = nullptr;
    std::size_t token_stride = 0;
    int n_tokens = 0, n_kv = 0;
    std::uint64_t* seen = nullptr;  ///< [ceil(n_kv / 64)]; may be memory of the host (allocate_shared)
};
Status see_cells(const SeeCells& args, Stream stream);

/// Masks of a call with exact windows (cache/exact_rows.h). A query wants an exact row if it sees its cell, and the row's position is below
/// `sink` or less than `recent` before its own, which is the last that it sees. Such a row is hidden among the cells, and among the exact rows
/// it has the cell's value; all others are hidden there. Token t of sequence s is row s*n_tokens + t of what is written.
struct WindowMasks {
    const std::uint16_t* mask = nullptr;  ///< mask[s*seq_stride + t*token_stride + cell], fp16; null: all are seen
    std::size_t token_stride = 0, seq_stride = 0;
    int n_seq = 1, n_tokens = 0, n_kv = 0;
    const std::int32_t* cells = nullptr;      ///< [n_seq][n_slots]: the cell of the exact row in a slot, or -1: none
    const std::int32_t* positions = nullptr;  ///< [n_seq][n_slots]
    int n_slots = 0, sink = 0, recent = 0;
    std::uint16_t* out = nullptr;  ///< [row][out_stride]: of the cells; hidden beyond n_kv
    std::size_t out_stride = 0;
    std::uint16_t* exact = nullptr;  ///< [row][n_slots]: of the exact rows
    /// Exact rows that the call's own step makes (NewRows): [row][n_new] of these alone, and [row][n_slots] of the others. Or none.
    const std::int32_t* new_slots = nullptr;  ///< [n_new], all in 0 .. n_slots - 1
    int n_new = 0;
    std::uint16_t *fresh = nullptr, *old = nullptr;
};
Status window_masks(const WindowMasks& args, Stream stream);

}  // namespace turboquant::cuda
