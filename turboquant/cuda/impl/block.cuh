// The work of a block: a part of one sequence's tiles, or its exact rows, for one KV head and one block of query rows.
#pragma once

#include "turboquant/cuda/impl/alibi.cuh"
#include "turboquant/cuda/impl/shared_layout.h"
#include "turboquant/cuda/impl/stream.cuh"

namespace turboquant::cuda {

inline constexpr float kQueryTop = 32500;  // 15 bits in two signed bytes
inline constexpr float kLeast = -1e30f;    // below all logits; differences of it with itself are 0, not NaN

template <int D, int kGroups>
struct Block {
    static constexpr int kRows = 4 * kGroups, n = fragment_rows(D);
    static constexpr bool kPowerOf2 = (D & (D - 1)) == 0;

    const AttentionParams& p;
    uint8_t* const shared;
    const int thread, warp, lane, g, t;

    AttentionItem item;
    int item_index, kv_head, row_block, first_row, n_kv;
    bool exact;
    int tile_begin, tile_end;

    __device__ __forceinline__ Block(const AttentionParams& params, uint8_t* memory)
        : p(params), shared(memory), thread(threadIdx.x), warp(uniform(threadIdx.x >> 5)), lane(threadIdx.x & 31), g(lane >> 2), t(lane & 3) {}

    __device__ __forceinline__ int position_of(int row) const { return n_kv - p.n_tokens + row / p.group; }
    __device__ __forceinline__ int visible_end(int row) const { return p.causal && !exact ? min(n_kv, position_of(row) + 1) : n_kv; }
    __device__ __forceinline__ int visible_begin(int row) const {
        return p.window > 0 && !exact ? max(0, position_of(row) + 1 - p.window) : 0;
    }

    /// The head's compressed rows are in the rotated space.
    __device__ __forceinline__ bool is_rotated(const SideParams& s) const {
        return !format_is_raw(s.head_codec ? uniform(s.head_codec[kv_head]) : s.codec);
    }

    __device__ __forceinline__ void find_work() {
        // Row blocks of an item are neighbours: they read the same tiles, one of them from memory. Exact rows are little work: their blocks
        // come after all others, so that these are spread evenly (and there is no block without work, which would take an even share too).
        int at = blockIdx.x;
        row_block = 0, kv_head = blockIdx.y, exact = false;
        if (p.has_exact) {
            const int compressed = p.n_compressed * p.n_row_blocks;
            exact = at >= compressed * p.n_head_kv;
            if (exact) at -= compressed * p.n_head_kv;
            const int each = exact ? p.n_seq * p.n_row_blocks : compressed;
            kv_head = at / each, at -= kv_head * each;
        }
        if (p.n_row_blocks > 1) {
            const int x = at;
            at = x / p.n_row_blocks, row_block = x - at * p.n_row_blocks;
        }
        if (p.items) {
            const AttentionItem from = p.items[exact ? p.n_compressed + at : at];
            item = {uniform(from.seq), uniform(from.split), uniform(from.n_splits), uniform(from.first_item)};
        } else {
            const int each = p.splits_each - (p.has_exact ? 1 : 0);
            item.seq = exact ? at : at / each, item.split = exact ? each : at - item.seq * each, item.n_splits = p.splits_each;
            item.first_item = item.seq * p.splits_each;
        }
        item_index = item.first_item + item.split;
        first_row = row_block * kRows;
        n_kv = p.n_kv;
        if (exact || p.seq_n_kv) n_kv = uniform(exact ? p.exact_n[item.seq] : p.seq_n_kv[item.seq]);
        const int last_row = min(first_row + kRows, p.n_rows) - 1;
        const int begin = visible_begin(first_row) / kTileKeys, end = (visible_end(last_row) + kTileKeys - 1) / kTileKeys;
        const int splits = item.n_splits - (p.has_exact ? 1 : 0), split = exact ? 0 : item.split, n_tiles = max(0, end - begin);
        // Whole pairs of tiles, which share the work of the score term. In 32 bits: up to 2^24 tiles in 128 parts.
        const unsigned n_pairs = static_cast<unsigned>(n_tiles + 1) / 2;
        tile_begin = exact ? begin : begin + static_cast<int>(2 * (n_pairs * split / splits));
        tile_end = exact ? end : min(end, begin + static_cast<int>(2 * (n_pairs * (split + 1) / splits)));
    }

    __device__ __forceinline__ float slope_of(int row) const { return mask_slope(p, kv_head * p.group + row % p.group); }
};

}  // namespace turboquant::cuda
