// What prefill does to single query rows, before and after attention: queries become two planes of bytes; parts become results. A row a
// warp: several at once (row_group.cuh) took 1.6 times as long, since all warps then load at the same time and none computes meanwhile.
#pragma once

#include "turboquant/cuda/impl/alibi.cuh"
#include "turboquant/cuda/impl/operand_bytes.cuh"
#include "turboquant/cuda/impl/rotate.cuh"

namespace turboquant::cuda {

inline constexpr int kRowsOfBlock = 8;

/// One query row per warp. grid: rows (padded) / kRowsOfBlock, kv heads, sequences.
template <int D>
__global__ void __launch_bounds__(32 * kRowsOfBlock) make_queries(const __grid_constant__ PrefillParams p) {
    __shared__ float rows[kRowsOfBlock][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x * kRowsOfBlock + warp, head = blockIdx.y, seq = blockIdx.z;
    const int token = row / p.a.group, format = HeadTilesAt(p.a.k, seq, head).format;
    const bool trellis = is_trellis_index(format);
    float* x = rows[warp];
    const float* from = p.a.q + seq * p.a.q_seq_stride + token * p.a.q_token_stride + (head * p.a.group + row - token * p.a.group) * p.a.q_head_stride;
    float top = 0;
    if constexpr ((D & (D - 1)) == 0) {
        float v[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; ++i) v[i] = row < p.a.n_rows ? from[lane + 32 * i] : 0;
        rotate_lanes<D>(v, lane, p.a.signs_in, p.a.signs_out);
#pragma unroll
        for (int i = 0; i < D / 32; ++i) x[lane + 32 * i] = v[i], top = fmaxf(top, fabsf(v[i]));
    } else {
        for (int i = lane; i < D; i += 32) x[i] = row < p.a.n_rows ? from[i] : 0;
        rotate_row<D>(x, lane, p.a.signs_in, p.a.signs_out, p.a.hartley);
        for (int i = lane; i < D; i += 32) top = fmaxf(top, fabsf(x[i]));
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    __syncwarp();
    const float f = top > 0 ? kPrefillTop / top : 0;
    WordPair out;
    if (lane < D / 4) {
#pragma unroll
        for (int b = 0; b < 4; ++b) out.put(b, __float2int_rn(x[dim_of<D>(lane, b, trellis)] * f));
    }
    const std::size_t unit = static_cast<std::size_t>(seq) * p.a.n_head_kv + head;
    uint8_t* plane = p.queries + (unit * p.n_groups + row / kGroupRows) * (2 * kQueryPlane);
    put_word(plane, row % kGroupRows, lane, out.high);
    put_word(plane + kQueryPlane, row % kGroupRows, lane, out.low);
    if (lane == 0)
        p.units[unit * p.n_groups * kGroupRows + row] =
            fmaxf(1e-30f, top * p.a.scale * kLog2e * p.a.table[format].step / kPrefillTop);
}

/// Merges the parts of a row, takes in the sink, divides, rotates back and writes. Grid as that of make_queries.
template <int D>
__global__ void __launch_bounds__(32 * kRowsOfBlock) finish_rows(const __grid_constant__ PrefillParams p) {
    __shared__ float rows[kRowsOfBlock][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x * kRowsOfBlock + warp, kv_head = blockIdx.y, seq = blockIdx.z;
    if (row >= p.a.n_rows) return;
    const int token = row / p.a.group, head = kv_head * p.a.group + row - token * p.a.group;
    const std::size_t step = static_cast<std::size_t>(p.a.n_head_kv) * p.n_groups * kGroupRows,
                      first = (static_cast<std::size_t>(seq) * p.n_parts * p.a.n_head_kv + kv_head) * p.n_groups * kGroupRows + row;
    constexpr int kEach = (D + 31) / 32;
    float top = -1e30f, all = 0, v[kEach] = {};
    for (int s = 0; s < p.n_parts; ++s) {
        const float2 ml = p.part_ml[first + s * step];
        const float now = fmaxf(top, ml.x), before = exp2_fast(top - now), by = exp2_fast(ml.x - now);
        all = fmaf(all, before, ml.y * by), top = now;
        const float* part = p.part + (first + s * step) * D;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (D % 32 == 0 || lane + 32 * i < D) v[i] = fmaf(v[i], before, part[lane + 32 * i] * by);
    }
    float f = 1;
    if (p.a.sinks) {
        const float sink = p.a.sinks[head] * kLog2e, now = fmaxf(top, sink);
        f = exp2_fast(top - now), all = fmaf(all, f, exp2_fast(sink - now)), top = now;
    }
    f = all > 0 ? f / all : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] *= f;
    float* to = p.a.out + seq * p.a.out_seq_stride + token * p.a.out_token_stride + head * p.a.out_head_stride;
    if constexpr ((D & (D - 1)) == 0) {
        rotate_lanes<D>(v, lane, p.a.signs_out, p.a.signs_in);
#pragma unroll
        for (int i = 0; i < kEach; ++i) to[lane + 32 * i] = v[i];
    } else {
        float* x = rows[warp];
        for (int i = 0; i < kEach; ++i)
            if (lane + 32 * i < D) x[lane + 32 * i] = v[i];
        __syncwarp();
        rotate_row<D>(x, lane, p.a.signs_out, p.a.signs_in, p.a.hartley);
        for (int i = lane; i < D; i += 32) to[i] = x[i];
    }
    if (p.a.lse && lane == 0)
        p.a.lse[(static_cast<std::size_t>(seq) * p.a.n_tokens + token) * p.a.n_head + head] = all > 0 ? (top + log2f(all)) * 0.6931471805599453f : -INFINITY;
}

}  // namespace turboquant::cuda
