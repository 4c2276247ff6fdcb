// From the partial results of warps to the output: warps merge in shared memory, blocks of a head through the workspace, the last of them
// takes in the sinks, rotates back and writes. Source of the merge: arXiv:2501.01005, eq. 3.
#pragma once

#include "turboquant/cuda/impl/block.cuh"
#include "turboquant/cuda/impl/rotate.cuh"

namespace turboquant::cuda {

/// atomicAdd that other blocks' writes before theirs are seen after, and this one's before.
__device__ __forceinline__ unsigned add_ordered(unsigned* to, unsigned x) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0,[%1],%2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
    return before;
}

template <int D, int kGroups>
struct Merge : Block<D, kGroups> {
    using Base = Block<D, kGroups>;
    using Base::p, Base::shared, Base::thread, Base::warp, Base::lane, Base::g, Base::t, Base::n, Base::kRows;
    using Base::item, Base::item_index, Base::kv_head, Base::row_block, Base::first_row, Base::n_kv, Base::exact, Base::tile_begin, Base::tile_end;
    __device__ __forceinline__ explicit Merge(const Base& block) : Base(block) {}

    /// Merges the warps, then the blocks.
    __device__ __forceinline__ void finish(float step, float (&o)[kGroups][D / 8], float (&most)[kGroups], float (&sum)[kGroups]) {
        const SharedLayout l = shared_layout(D, kGroups, 0, 0, item.n_splits);
        float* of_warps = reinterpret_cast<float*>(shared + l.of_warps);
        float2* state = reinterpret_cast<float2*>(shared + l.state);
        float* rows = reinterpret_cast<float*>(shared + l.result);
        constexpr int kStride = D + 4;
        __syncthreads();
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum[s] += __shfl_xor_sync(~0u, sum[s], d);
            float* to = of_warps + (warp * kRows + 4 * s + t) * kStride + g * (D / 8);
#pragma unroll
            for (int i = 0; i < D / 8; ++i) to[i] = o[s][i] * step;
            if (g == 0) state[warp * kRows + 4 * s + t] = make_float2(most[s], sum[s]);
        }
        __syncthreads();
        const int n_units = p.n_head_kv * p.n_row_blocks, unit = kv_head * p.n_row_blocks + row_block;
        const std::size_t slot = static_cast<std::size_t>(item_index) * n_units + unit;
        const bool alone = item.n_splits == 1 && !p.parts_only;
        float2* total = reinterpret_cast<float2*>(shared + l.total);
#pragma unroll 1
        for (int i = thread; i < kRows * D / 4; i += 32 * kWarps) {
            const int r = i / (D / 4), d = i % (D / 4) * 4;
            float top = kLeast, all = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) top = fmaxf(top, state[w * kRows + r].x);
            float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 ml = state[w * kRows + r];
                const float f = exp2_fast(ml.x - top);
                const float4 y = *reinterpret_cast<const float4*>(of_warps + (w * kRows + r) * kStride + d);
                all = fmaf(f, ml.y, all);
                x.x = fmaf(f, y.x, x.x), x.y = fmaf(f, y.y, x.y), x.z = fmaf(f, y.z, x.z), x.w = fmaf(f, y.w, x.w);
            }
            if (alone)
                *reinterpret_cast<float4*>(rows + r * D + d) = x;
            else
                reinterpret_cast<float4*>(p.part + slot * kRows * D)[i] = x;
            if (d == 0) (alone ? total : p.part_ml + slot * kRows)[r] = make_float2(top, all);
        }
        if (!alone && !merge_blocks(l, n_units, unit, rows, total)) return;
        __syncthreads();
        write(rows, total);
    }

    /// True in the last block of its head to get here; then `rows` and `total` hold the merged result.
    __device__ __forceinline__ bool merge_blocks(const SharedLayout& l, int n_units, int unit, float* rows, float2* total) {
        if (p.parts_only) return false;
        int* last = reinterpret_cast<int*>(shared + l.last);
        unsigned* count = p.count + static_cast<std::size_t>(item.seq) * n_units + unit;
        __syncthreads();  // what the block wrote is before what its first thread does, and that is before what it reads
        if (thread == 0) *last = add_ordered(count, 1u) == item.n_splits - 1u;
        __syncthreads();
        if (!*last) return false;
        if (thread == 0) *count = 0;
        constexpr int kBatch = 16;
        const std::size_t first = (static_cast<std::size_t>(item.first_item) * n_units + unit) * kRows, step = static_cast<std::size_t>(n_units) * kRows;
        const float4* parts = reinterpret_cast<const float4*>(p.part + first * D);
        const int i0 = thread;
        float4 x[kBatch];
#pragma unroll
        for (int s = 0; s < kBatch; ++s)
            x[s] = s < item.n_splits && i0 < kRows * D / 4 ? __ldcg(parts + s * step * (D / 4) + i0) : make_float4(0, 0, 0, 0);
        // Weights of the splits, while the first parts are on their way.
        float* weights = reinterpret_cast<float*>(shared + l.weights);
#pragma unroll 1
        for (int r = warp; r < kRows; r += kWarps) {
            float top = kLeast, all = 0;
#pragma unroll 1
            for (int s = lane; s < item.n_splits; s += 32) {
                const float2 ml = __ldcg(p.part_ml + first + s * step + r);
                const float now = fmaxf(top, ml.x);
                all = fmaf(all, exp2_fast(top - now), ml.y * exp2_fast(ml.x - now));
                top = now;
                weights[r * item.n_splits + s] = ml.x;
            }
            float m = top;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
            all *= exp2_fast(top - m);
#pragma unroll
            for (int d = 1; d < 32; d *= 2) all += __shfl_xor_sync(~0u, all, d);
#pragma unroll 1
            for (int s = lane; s < item.n_splits; s += 32) weights[r * item.n_splits + s] = exp2_fast(weights[r * item.n_splits + s] - m);
            if (lane == 0) total[r] = make_float2(m, all);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = i0; i < kRows * D / 4; i += 32 * kWarps) {
            const float* weight = weights + i / (D / 4) * item.n_splits;
            float4 y = make_float4(0, 0, 0, 0);
#pragma unroll 1
            for (int s0 = 0; s0 < item.n_splits; s0 += kBatch) {
                if (s0 > 0 || i != i0) {
#pragma unroll
                    for (int s = 0; s < kBatch; ++s)
                        x[s] = s0 + s < item.n_splits ? __ldcg(parts + (s0 + s) * step * (D / 4) + i) : make_float4(0, 0, 0, 0);
                }
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    const float f = s0 + s < item.n_splits ? weight[s0 + s] : 0;
                    y.x = fmaf(f, x[s].x, y.x), y.y = fmaf(f, x[s].y, y.y), y.z = fmaf(f, x[s].z, y.z), y.w = fmaf(f, x[s].w, y.w);
                }
            }
            reinterpret_cast<float4*>(rows)[i] = y;
        }
        return true;
    }

    /// Sinks, the division, the way back out of the rotated space.
    __device__ __forceinline__ void write(float* rows, const float2* total) {
        const bool rotate_out = this->is_rotated(p.v);
#pragma unroll 1
        for (int r = warp; r < kRows; r += kWarps) {
            const int row = first_row + r;
            if (row >= p.n_rows) break;
            const int token = row / p.group, head = kv_head * p.group + row - token * p.group;
            float* x = rows + r * D;
            float top = total[r].x, all = total[r].y;
            float f = 1;
            if (p.sinks) {
                const float sink = p.sinks[head] * kLog2e, now = fmaxf(top, sink);
                f = exp2_fast(top - now), all = fmaf(all, f, exp2_fast(sink - now)), top = now;
            }
            f = all > 0 ? f / all : 0;
            float* to = p.out + item.seq * p.out_seq_stride + token * p.out_token_stride + head * p.out_head_stride;
            if constexpr ((D & (D - 1)) == 0) {
                float v[D / 32];
#pragma unroll
                for (int i = 0; i < D / 32; ++i) v[i] = x[lane + 32 * i] * f;
                if (rotate_out) rotate_lanes<D>(v, lane, p.signs_out, p.signs_in);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) to[lane + 32 * i] = v[i];
            } else {
                for (int i = lane; i < D; i += 32) x[i] *= f;
                __syncwarp();
                if (rotate_out) rotate_row<D>(x, lane, p.signs_out, p.signs_in, p.hartley);
                for (int i = lane; i < D; i += 32) to[i] = x[i];
            }
            if (p.lse && lane == 0)
                p.lse[(static_cast<std::size_t>(item.seq) * p.n_tokens + token) * p.n_head + head] =
                    all > 0 ? (top + log2f(all)) * 0.6931471805599453f : -INFINITY;
        }
    }
};

}  // namespace turboquant::cuda
