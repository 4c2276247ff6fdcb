// Which vectors a block has, and which of them go into the same tile.
#pragma once

#include "turboquant/cuda/impl/encode_call.h"
#include "turboquant/cuda/impl/simt.h"

namespace turboquant::cuda {

inline constexpr int kMaxBlockTokens = 64;

/// Tokens of a block, in shared memory. With 64 tokens a block, blocks begin at multiples of 64 of the first cell, so that successive cells
/// make whole tiles.
struct BlockTokens {
    std::int32_t token[kMaxBlockTokens], tile[kMaxBlockTokens];  ///< tile -1: none
    std::uint32_t slot[kMaxBlockTokens];
    std::int32_t list[kMaxBlockTokens];  ///< indices of those in the tile at hand

    TQ_DEVICE void load(const EncodeCall& a, int block, const Thread& thread) {
        int skipped = 0;
        if (a.tokens_per_block == kTileKeys) skipped = static_cast<int>(a.cells[0] & (kTileKeys - 1));
        for (int i = thread.index; i < kMaxBlockTokens; i += thread.count) {
            const int k = block * a.tokens_per_block - skipped + i;
            const bool mine = i < a.tokens_per_block && k >= 0 && k < a.n;
            const std::int64_t cell = mine ? a.cells[k] : -1;
            token[i] = k;
            tile[i] = cell < 0 ? -1 : static_cast<std::int32_t>(cell / kTileKeys);
            slot[i] = static_cast<std::uint32_t>(cell & (kTileKeys - 1));
        }
    }
};

/// 64 votes of a warp's lanes, each for tokens lane and lane + 32.
template <class F>
TQ_DEVICE std::uint64_t ballot64(int lane, F f) {
    const std::uint32_t low = ballot(f(lane)), high = ballot(f(lane + 32));
    return low | static_cast<std::uint64_t>(high) << 32;
}

}  // namespace turboquant::cuda
