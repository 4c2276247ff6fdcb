// What the kernels that make operands of prefill share: the order of bytes in a row, and where a panel's tiles are.
#pragma once

#include "turboquant/cuda/impl/prefill_params.h"

namespace turboquant::cuda {

__device__ __forceinline__ void put_word(uint8_t* plane, int row, int word, uint32_t value) {
    *reinterpret_cast<uint32_t*>(plane + swizzled(row, word)) = value;
}

/// Cell of a tile at a position.
__device__ __forceinline__ int cell_of_position(int p) { return p < kTileKeys / 2 ? p ^ 7 : p; }

/// A side's first tile of a sequence and head, and its format.
struct HeadTilesAt {
    const uint8_t* tiles;
    int format;
    __device__ __forceinline__ HeadTilesAt(const SideParams& s, int seq, int head)
        : tiles(s.tiles + seq * s.seq_stride + (s.head_at ? s.head_at[head] : head * s.head_stride)), format(s.head_codec ? s.head_codec[head] : s.codec) {}
};

__device__ __forceinline__ int cells_of(const AttentionParams& p, int seq) { return p.seq_n_kv ? min(p.seq_n_kv[seq], p.n_kv) : p.n_kv; }

/// Four integers of 15 bits as bytes, high and low ones.
struct WordPair {
    uint32_t high = 0, low = 0;
    __device__ __forceinline__ void put(int b, int v) {
        const int lo = static_cast<int8_t>(v), hi = (v - lo) >> 8;
        high |= static_cast<uint32_t>(hi & 255) << 8 * b, low |= static_cast<uint32_t>(lo & 255) << 8 * b;
    }
};
inline constexpr float kPrefillTop = 32500;
/// The dim that byte b of a row's word holds.
template <int D>
__device__ __forceinline__ int dim_of(int word, int b, bool trellis) {
    constexpr int n = fragment_rows(D);
    return word / n * 4 * n + (trellis ? word % n + n * b : 4 * (word % n) + b);
}
__device__ __forceinline__ bool is_trellis_index(int format) {
    return format >= fragment_codec_index(CodecId::tcq1) && format <= fragment_codec_index(CodecId::tcq5);
}

}  // namespace turboquant::cuda
