// The end of a call whose newest rows were made while its other parts were under way (attention.h, run_before_rows): a block takes a query
// row, attends to the newest rows where the model made them, and merges the parts; other blocks of the launch keep these rows.
#pragma once

#include <cstring>
#include <type_traits>

#include "turboquant/attention/attention.h"
#include "turboquant/cuda/impl/join_params.h"
#include "turboquant/cuda/impl/merge.cuh"
#include "turboquant/cuda/impl/step.h"

namespace turboquant::cuda {

/// One query row, by a block: each warp takes every fourth part, and every fourth of the newest rows. kOne: there is but one of these.
template <int D, bool kOne>
struct Join {
    static constexpr int kEach = D / 32, kBatch = 64 / kEach;
    /// Newest rows of a warp that are loaded together, and warps that have some.
    static constexpr int kTogether = kOne || D > 256 ? 1 : D > 128 ? 2 : 4, kFreshWarps = kOne ? 1 : kWarps;
    static constexpr int kVector = kEach < 4 ? kEach : 4;  // floats that are loaded at once
    using Vector = std::conditional_t<kVector == 2, float2, float4>;
    struct Shared {
        alignas(16) float y[kWarps][D], fresh[kFreshWarps][D];
        float2 total[kWarps];
    };
    const AttentionParams& p;
    const JoinParams& j;
    Shared& shared;
    const int warp, lane, seq, kv_head, row, token, head;

    __device__ __forceinline__ void run() const {
        const int n_units = p.n_head_kv * p.n_row_blocks, rows = j.rows_of_block, unit = kv_head * p.n_row_blocks + row / rows;
        int n_parts = p.splits_each, first_item = seq * p.splits_each;
        if (p.items) {  // exact rows' items come last, one for each sequence
            const AttentionItem item = p.items[p.n_compressed + seq];
            n_parts = item.n_splits, first_item = item.first_item;
        }
        const std::size_t step = static_cast<std::size_t>(n_units) * rows,
                          at = (static_cast<std::size_t>(first_item + warp) * n_units + unit) * rows + row % rows;
        const float* parts = p.part + at * D;
        const int n = (n_parts - warp + kWarps - 1) / kWarps;  // at most 32 (attention_plan.cpp)

        // All loads that wait for nothing.
        float q[kEach], k[kTogether][kEach], v[kTogether][kEach];
        const std::uint16_t seen = lane < j.n && lane % kWarps == warp ? j.mask[(seq * p.n_tokens + token) * j.n + lane] : kMaskHidden;
        if (has_fresh()) {
            const float* from = (p.exact_q ? p.exact_q : p.q) + seq * p.q_seq_stride + token * p.q_token_stride + head * p.q_head_stride;
#pragma unroll
            for (int i = 0; i < kEach; ++i) q[i] = from[lane + 32 * i];
            load_rows(j.kept.of[0], warp, k), load_rows(j.kept.of[1], warp, v);
        }
        const float2 ml = lane < n ? __ldcg(p.part_ml + at + lane * kWarps * step) : make_float2(kLeast, 0);
        float x[kBatch][kEach];
        load_parts(parts, step, 0, n, x);

        // The newest rows: lane i has row i's logit, in units of log2.
        float logit = kLeast;
        const bool any_seen = __any_sync(~0u, seen != kMaskHidden);
        for_each(any_seen, j.kept.of[0], k, [&](int i, const float (&key)[kEach]) {
            float dot = 0;
#pragma unroll
            for (int d = 0; d < kEach; ++d) dot = fmaf(q[d], key[d], dot);
            dot = sum(dot);
            if (lane == i && seen != kMaskHidden) logit = dot * p.scale * kLog2e;
        });
        if (seen != kMaskHidden && p.softcap != 0) logit = p.softcap * kLog2e * tanhf(logit / (p.softcap * kLog2e));
        if (seen != kMaskHidden && seen) logit = fmaf(__half2float(__ushort_as_half(seen)), mask_slope(p, head), logit);

        const float top = most(fmaxf(logit, ml.x)), weight = seen != kMaskHidden ? exp2_fast(logit - top) : 0, of_part = exp2_fast(ml.x - top);
        const float all = sum(fmaf(of_part, ml.y, weight));
        float y[kEach] = {}, fresh[kEach] = {};
#pragma unroll 1
        for (int s0 = 0; s0 < n; s0 += kBatch) {
            if (s0) load_parts(parts, step, s0, n, x);
#pragma unroll
            for (int s = 0; s < kBatch; ++s) {
                const float f = __shfl_sync(~0u, of_part, (s0 + s) & 31);  // of none: 0 times 0
#pragma unroll
                for (int i = 0; i < kEach; ++i) y[i] = fmaf(f, x[s][i], y[i]);
            }
        }
        for_each(any_seen, j.kept.of[1], v, [&](int i, const float (&value)[kEach]) {
            const float w = __shfl_sync(~0u, weight, i);
            if (!kOne && w == 0) return;  // not this sequence's, whatever it holds
#pragma unroll
            for (int d = 0; d < kEach; ++d) fresh[d] = fmaf(w, value[d], fresh[d]);
        });
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            shared.y[warp][place(i)] = y[i];
            if (has_fresh()) shared.fresh[warp][lane + 32 * i] = fresh[i];
        }
        if (lane == 0) shared.total[warp] = make_float2(top, all);
        __syncthreads();
        if (warp == 0) finish();
    }

  private:
    /// Sinks, the division, the way back out of the rotated space, where the newest rows' values are.
    __device__ __forceinline__ void finish() const {
        const float sink = p.sinks ? p.sinks[head] * kLog2e : kLeast;
        float top = sink, factor[kWarps], y[kEach] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.total[w].x);
        float all = p.sinks ? exp2_fast(sink - top) : 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            factor[w] = exp2_fast(shared.total[w].x - top), all = fmaf(factor[w], shared.total[w].y, all);
#pragma unroll
            for (int i = 0; i < kEach; ++i) y[i] = fmaf(factor[w], shared.y[w][lane + 32 * i], y[i]);
        }
        if (!format_is_raw(p.v.head_codec ? p.v.head_codec[kv_head] : p.v.codec)) rotate_lanes<D>(y, lane, p.signs_out, p.signs_in);
#pragma unroll
        for (int w = 0; w < kFreshWarps; ++w) {
            if (!kOne && w >= j.n) break;
#pragma unroll
            for (int i = 0; i < kEach; ++i) y[i] = fmaf(factor[w], shared.fresh[w][lane + 32 * i], y[i]);
        }
        const float f = all > 0 ? 1 / all : 0;
        float* to = p.out + seq * p.out_seq_stride + token * p.out_token_stride + head * p.out_head_stride;
#pragma unroll
        for (int i = 0; i < kEach; ++i) to[lane + 32 * i] = y[i] * f;
        if (p.lse && lane == 0)
            p.lse[(static_cast<std::size_t>(seq) * p.n_tokens + token) * p.n_head + head] = all > 0 ? (top + log2f(all)) * 0.6931471805599453f : -INFINITY;
    }

    __device__ __forceinline__ bool has_fresh() const { return kOne ? warp == 0 : warp < j.n; }
    /// f(i, row i) for this warp's newest rows, of which the first ones are there already.
    template <class F>
    __device__ __forceinline__ void for_each(bool any, const KeepRows& from, float (&x)[kTogether][kEach], F&& f) const {
        if (!any) return;
        if constexpr (kOne) {
            f(0, x[0]);
        } else {
#pragma unroll 1
            for (int i = warp; i < j.n; i += kTogether * kWarps) {
                if (i != warp) load_rows(from, i, x);
#pragma unroll
                for (int m = 0; m < kTogether; ++m)
                    if (i + m * kWarps < j.n) f(i + m * kWarps, x[m]);
            }
        }
    }
    /// Rows first, first + kWarps, ..
    __device__ __forceinline__ void load_rows(const KeepRows& from, int first, float (&x)[kTogether][kEach]) const {
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
            const int i = first + m * kWarps;
            const float* row_of = from.x + i * from.stride + kv_head * D;
#pragma unroll
            for (int d = 0; d < kEach; ++d) x[m][d] = kOne || i < j.n ? row_of[lane + 32 * d] : 0;
        }
    }
    __device__ __forceinline__ static float sum(float x) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
        return x;
    }
    __device__ __forceinline__ static float most(float x) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
        return x;
    }
    /// Of each part a lane has dims place(0), .. place(kEach - 1).
    __device__ __forceinline__ int place(int i) const { return (i / kVector * 32 + lane) * kVector + i % kVector; }
    __device__ __forceinline__ void load_parts(const float* parts, std::size_t step, int s0, int n, float (&x)[kBatch][kEach]) const {
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
            const float* part = parts + (s0 + s) * kWarps * step * D;
#pragma unroll
            for (int i = 0; i < kEach; i += kVector) {
                Vector v{};
                if (s0 + s < n) v = __ldcg(reinterpret_cast<const Vector*>(part + place(i)));
                memcpy(&x[s][i], &v, sizeof v);
            }
        }
    }
};

/// A query row a block, then 4 heads of kept rows a block, keys and values.
template <int D, bool kOne>
__global__ void __launch_bounds__(32 * kWarps) join_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ JoinParams j) {
    __shared__ typename Join<D, kOne>::Shared shared;
    const int warp = uniform(threadIdx.x >> 5), lane = threadIdx.x & 31, n_join = p.n_seq * p.n_head_kv * p.n_rows;
    let_next_begin();
    if (static_cast<int>(blockIdx.x) < n_join) {
        const int unit = blockIdx.x / p.n_rows, row = blockIdx.x - unit * p.n_rows;
        const int seq = unit / p.n_head_kv, kv_head = unit - seq * p.n_head_kv, token = row / p.group;
        Join<D, kOne>{p, j, shared, warp, lane, seq, kv_head, row, token, kv_head * p.group + row - token * p.group}.run();
        return;
    }
    const int at = (blockIdx.x - n_join) * kWarps + warp;
    if (at >= 2 * j.n * p.n_head_kv) return;
    const KeepRows& a = j.kept.of[at & 1];
    const int i = (at >> 1) / p.n_head_kv, head = (at >> 1) - i * p.n_head_kv;
    keep_head<D / 32>(a, i, head, lane);
}

}  // namespace turboquant::cuda
