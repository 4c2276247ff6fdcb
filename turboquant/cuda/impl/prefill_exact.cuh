// The exact rows' part of prefill: 64 query rows a block, 16 a warp, over the raw tiles that some row of the block sees, by products of
// halves. Keys and values are the A operand, in the order in which the tiles have them (products.cuh), queries and weights are B, in two
// halves each: 22 bits. A part like those of prefill_kernel, merged with them by finish_rows.
#pragma once

#include "turboquant/cuda/impl/alibi.cuh"
#include "turboquant/cuda/impl/prefill_params.h"
#include "turboquant/cuda/impl/rotate.cuh"
#include "turboquant/cuda/impl/row_group.cuh"
#include "turboquant/cuda/impl/term.cuh"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {

inline constexpr int kExactRows = 64, kExactWarps = 4, kExactWords = 64;  ///< of 32 tiles each (prefill.h, kMostExactTiles)

/// Offsets in bytes.
struct ExactShared {
    int operands, rows, units, tiles, bytes;
};
constexpr ExactShared exact_shared(int head_dim) {
    ExactShared l{};
    l.operands = 2 * 2 * 128 * head_dim;  // two stages of keys and values
    l.rows = l.operands + kExactWarps * head_dim / 16 * 4 * 32 * 8;
    l.units = l.rows + kExactWarps * head_dim * 4;
    l.tiles = l.units + kExactRows * 4;
    l.bytes = l.tiles + kExactWarps * kExactWords * 4;
    return l;
}

template <int D>
struct ExactPart {
    static constexpr int n = D / 16;
    static constexpr ExactShared l = exact_shared(D);
    const PrefillParams& p;
    uint8_t* const shared;
    const int head, seq, warp, lane, g, t, first_row;  // of the warp

    __device__ __forceinline__ ExactPart(const PrefillParams& params, uint8_t* memory)
        : p(params), shared(memory), head(blockIdx.y), seq(blockIdx.z), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), g(lane >> 2), t(lane & 3),
          first_row(blockIdx.x * kExactRows + 16 * warp) {}

    __device__ __forceinline__ int last() const { return p.a.n_rows - 1; }
    __device__ __forceinline__ uint2* operands() const { return reinterpret_cast<uint2*>(shared + l.operands) + warp * n * 4 * 32; }
    __device__ __forceinline__ unsigned* words(int w) const { return reinterpret_cast<unsigned*>(shared + l.tiles) + w * kExactWords; }

    /// Tiles that the warp's rows see, as bits.
    __device__ __forceinline__ void find_tiles() const {
        const int token = min(first_row, last()) / p.a.group, n_tokens = min(first_row + 15, last()) / p.a.group - token + 1;
        const uint8_t* flags = p.a.exact_mask_tiles + static_cast<std::size_t>(seq * p.a.n_tokens + token) * p.a.exact_tiles;
        for (int w = 0; w < kExactWords; ++w) {
            unsigned seen = 0;
            if (32 * w + lane < p.a.exact_tiles && first_row <= last())
                for (int i = 0; i < n_tokens; ++i) seen |= flags[i * p.a.exact_tiles + 32 * w + lane];
            const unsigned word = __ballot_sync(~0u, (seen & kMaskShows) != 0);
            if (lane == 0) words(warp)[w] = word;
            if (32 * (w + 1) >= p.a.exact_tiles) break;
        }
    }
    /// The first tile from `tile` on that some row of the block sees; exact_tiles: none.
    __device__ __forceinline__ int next_tile(int tile) const {
        for (; tile < p.a.exact_tiles; tile = (tile / 32 + 1) * 32) {
            unsigned word = 0;
            for (int w = 0; w < kExactWarps; ++w) word |= words(w)[tile / 32];
            word &= ~0u << (tile & 31);
            if (word) return tile / 32 * 32 + __ffs(static_cast<int>(word)) - 1;
        }
        return p.a.exact_tiles;
    }
    __device__ __forceinline__ void fetch(int tile, int stage) const {
        if (tile < p.a.exact_tiles) {
            const auto of = [&](const SideParams& s) { return s.tiles + seq * s.seq_stride + head * s.head_stride + tile * s.tile_stride; };
            uint8_t* to = shared + stage * 2 * 128 * D;
#pragma unroll 1
            for (int i = 16 * threadIdx.x; i < 128 * D; i += 16 * 32 * kExactWarps)
                copy_async(to + i, of(p.a.exact_k) + i), copy_async(to + 128 * D + i, of(p.a.exact_v) + i);
        }
        commit_copies();
    }

    /// Rotated queries as operands: [step][rows 0..7, 8..15][high, low][lane]. Lane 4 (row % 8) + i has row's dims 4n*i .. 4n*(i + 1) - 1, four
    /// of each step.
    __device__ __forceinline__ uint2* operand_of(int r, int dim) const {
        return operands() + (dim % (4 * n) / 4 * 4 + r / 8 * 2) * 32 + r % 8 * 4 + dim / (4 * n);
    }
    __device__ __forceinline__ const float* query(int r) const {
        const int row = min(first_row + r, last()), token = row / p.a.group;
        const float* q = (p.a.exact_q ? p.a.exact_q : p.a.q) + seq * p.a.q_seq_stride;
        return q + token * p.a.q_token_stride + (head * p.a.group + row - token * p.a.group) * p.a.q_head_stride;
    }
    __device__ __forceinline__ void put_unit(int r, float top) const {
        reinterpret_cast<float*>(shared + l.units)[16 * warp + r] = fmaxf(1e-30f, top * p.a.scale * kLog2e);
    }
    __device__ __forceinline__ void make_queries() const {
        if constexpr (D == 64 || D == 128) {
            const RowGroup<D> group(lane);
#pragma unroll 1
            for (int i = 0; i < 16; i += group.kRows) {
                const int r = i + group.row;
                float v[16];
                group.load(query(r), v);
                group.rotate(v, p.a.signs_in, p.a.signs_out);
                const float top = group.largest(v), f = top > 0 ? 1 / top : 0;
#pragma unroll
                for (int e = 0; e < 16; e += 4) {
                    const __half2 a = __floats2half2_rn(v[e] * f, v[e + 1] * f), b = __floats2half2_rn(v[e + 2] * f, v[e + 3] * f);
                    const float2 a2 = __half22float2(a), b2 = __half22float2(b);
                    uint2* to = operand_of(r, group.dim(e));
                    to[0] = make_uint2(bits_of(a), bits_of(b));
                    to[32] = make_uint2(bits_of(__floats2half2_rn(fmaf(v[e], f, -a2.x), fmaf(v[e + 1], f, -a2.y))),
                                        bits_of(__floats2half2_rn(fmaf(v[e + 2], f, -b2.x), fmaf(v[e + 3], f, -b2.y))));
                }
                if (group.lane == 0) put_unit(r, top);
            }
            __syncwarp();
        } else {
#pragma unroll 1
            for (int r = 0; r < 16; ++r) make_query(r);
        }
    }
    /// One row by all lanes, for head sizes that are not powers of two.
    __device__ __forceinline__ void make_query(int r) const {
        float* x = reinterpret_cast<float*>(shared + l.rows) + warp * D;
        const float* from = query(r);
#pragma unroll 1
        for (int i = lane; i < D; i += 32) x[i] = from[i];
        rotate_row<D>(x, lane, p.a.signs_in, p.a.signs_out, p.a.hartley);
        float top = 0;
#pragma unroll 1
        for (int i = lane; i < D; i += 32) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
        for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float f = top > 0 ? 1 / top : 0;
#pragma unroll 1
        for (int dim = 2 * lane; dim < D; dim += 64) {
            const float a = x[dim] * f, b = x[dim + 1] * f;
            const __half2 high = __floats2half2_rn(a, b);
            const float2 back = __half22float2(high);
            uint32_t* to = reinterpret_cast<uint32_t*>(operand_of(r, dim)) + dim / 2 % 2;
            to[0] = bits_of(high), to[2 * 32] = bits_of(__floats2half2_rn(a - back.x, b - back.y));
        }
        if (lane == 0) put_unit(r, top);
        __syncwarp();
    }

    __device__ __forceinline__ float slope_of(int row) const { return p.a.max_bias == 0 ? kLog2e : alibi_slope(row); }
    __device__ __noinline__ float alibi_slope(int row) const { return mask_slope(p.a, head * p.a.group + row % p.a.group); }
    __device__ __forceinline__ int row_of(int half, int j) const { return min(first_row + 8 * half + 2 * t + j, last()); }

    /// Logits, in units of log2, of the tile's keys 16 pair + g (+ 8) with rows 8 half + 2t (+ 1): x[pair][half][2 (second key) + row].
    __device__ __forceinline__ void scores(const uint8_t* keys, int tile, float (&x)[4][2][4]) const {
        uint16_t mask[2][2][8];  // on its way while products are made
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint16_t* m = p.a.exact_mask + seq * p.a.exact_mask_seq_stride + row_of(half, j) / p.a.group * p.a.exact_mask_token_stride + tile * kTileKeys;
#pragma unroll
                for (int e = 0; e < 8; ++e) mask[half][j][e] = m[cell_at(e, g)];
            }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
#pragma unroll
            for (int i = 0; i < 8; ++i) x[pair][i / 4][i % 4] = 0;
#pragma unroll 1
        for (int i = 0; i < n; ++i) {
            const uint2* b = operands() + i * 4 * 32 + lane;
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const uint4 a = *reinterpret_cast<const uint4*>(keys + (pair * n + i) * 512 + lane * 16);
#pragma unroll
                for (int k = 0; k < 4; ++k) mma_f16(x[pair][k % 2], a, b[64 * (k % 2) + 32 * (k / 2)].x, b[64 * (k % 2) + 32 * (k / 2)].y);
            }
        }
        // Step by step: a branch around one logit's part would cost each its own fetch of instructions.
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float unit = reinterpret_cast<const float*>(shared + l.units)[16 * warp + 8 * half + 2 * t + j];
#pragma unroll
                for (int e = 0; e < 8; ++e) x[e / 2][half][e % 2 * 2 + j] *= unit;
            }
        if (p.a.softcap != 0) {
            const float cap = p.a.softcap * kLog2e, inverse_cap = 1 / cap;
#pragma unroll
            for (int i = 0; i < 32; ++i) x[i / 8][i / 4 % 2][i % 4] = cap * tanhf(x[i / 8][i / 4 % 2][i % 4] * inverse_cap);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float slope = slope_of(row_of(half, j));
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float& y = x[e / 2][half][e % 2 * 2 + j];
                    y = fmaf(__half2float(__ushort_as_half(mask[half][j][e])), slope, y);
                }
            }
    }

    __device__ __forceinline__ void run() const {
        float o[n][2][4] = {}, most[2][2], sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) most[i / 2][i % 2] = -1e30f;
        find_tiles();
        __syncthreads();
        int tile = next_tile(0), stage = 0;
        fetch(tile, 0);
        make_queries();
        for (int next; tile < p.a.exact_tiles; tile = next, stage ^= 1) {
            next = next_tile(tile + 1);
            fetch(next, stage ^ 1);
            wait_for_copies_but_last();
            __syncthreads();
            if (words(warp)[tile / 32] >> (tile & 31) & 1) add(shared + stage * 2 * 128 * D, tile, o, most, sum);
            __syncthreads();
        }
        wait_for_copies();
        write(o, most, sum);
    }

    __device__ __forceinline__ void add(const uint8_t* keys, int tile, float (&o)[n][2][4], float (&most)[2][2], float (&sum)[2][2]) const {
        float x[4][2][4];
        scores(keys, tile, x);
        bool grown = false;
        float now[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float top = most[half][j];
#pragma unroll
                for (int e = 0; e < 8; ++e) top = fmaxf(top, x[e / 2][half][e % 2 * 2 + j]);
#pragma unroll
                for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                now[half][j] = top, grown |= top > most[half][j];
            }
        if (__any_sync(~0u, grown)) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const float alpha = exp2_fast(most[half][j] - now[half][j]);
                    sum[half][j] *= alpha, most[half][j] = now[half][j];
#pragma unroll
                    for (int i = 0; i < n; ++i) o[i][half][j] *= alpha, o[i][half][2 + j] *= alpha;
                }
        }
        uint32_t high[2][8], low[2][8];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float a = exp2_fast(x[e / 2][half][e % 2 * 2] - most[half][0]), b = exp2_fast(x[e / 2][half][e % 2 * 2 + 1] - most[half][1]);
                sum[half][0] += a, sum[half][1] += b;
                const __half2 h = __floats2half2_rn(a, b);
                const float2 back = __half22float2(h);
                high[half][e] = movmatrix(bits_of(h)), low[half][e] = movmatrix(bits_of(__floats2half2_rn(a - back.x, b - back.y)));
            }
        const uint8_t* values = keys + 128 * D;
#pragma unroll
        for (int i = 0; i < n; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const uint4 a = *reinterpret_cast<const uint4*>(values + (4 * i + k) * 512 + lane * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) mma_f16(o[i][half], a, high[half][2 * k], high[half][2 * k + 1]);
#pragma unroll
                for (int half = 0; half < 2; ++half) mma_f16(o[i][half], a, low[half][2 * k], low[half][2 * k + 1]);
            }
    }

    __device__ __forceinline__ void write(const float (&o)[n][2][4], const float (&most)[2][2], float (&sum)[2][2]) const {
        const std::size_t first =
            ((static_cast<std::size_t>(seq) * p.n_parts + p.n_splits) * p.a.n_head_kv + head) * p.n_groups * kGroupRows;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int d = 4; d < 32; d *= 2) sum[half][j] += __shfl_xor_sync(~0u, sum[half][j], d);
                const int row = first_row + 8 * half + 2 * t + j;
                if (row > last()) continue;
                float* to = p.part + (first + row) * D + 2 * n * g;  // whole sectors: single floats would take most of the kernel's time
                const auto value = [&](int i) { return o[i % n][half][i / n * 2 + j]; };
#pragma unroll
                for (int i = 0; i < 2 * n; i += 4 - n % 2 * 2)
                    if constexpr (n % 2 == 0)
                        *reinterpret_cast<float4*>(to + i) = make_float4(value(i), value(i + 1), value(i + 2), value(i + 3));
                    else
                        *reinterpret_cast<float2*>(to + i) = make_float2(value(i), value(i + 1));
                if (g == 0) p.part_ml[first + row] = make_float2(most[half][j], sum[half][j]);
            }
    }
};

/// grid: blocks of 64 rows, kv heads, sequences.
template <int D>
__global__ void __launch_bounds__(32 * kExactWarps, 2) exact_part(const __grid_constant__ PrefillParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    ExactPart<D>(p, shared).run();
}

}  // namespace turboquant::cuda
