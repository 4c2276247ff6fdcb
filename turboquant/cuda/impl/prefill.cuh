// Attention of many query rows over panels (prefill_params.h), for sm_90a: one warpgroup fetches, two compute, 64 rows each.
//
// Both products are exact in integers: queries have 15 bits and weights 16, as two planes of bytes each, and levels are bytes. Two products
// of bytes take the time of one of halves. What the planes give is joined in registers; weights are relative to the largest of their panel
// (nothing is lost in long contexts), so the sum over a panel is joined with the running one in floats. Source of the division of labour:
// FlashAttention-3, arXiv:2407.08608.
#pragma once

#include "turboquant/cuda/impl/alibi.cuh"
#include "turboquant/cuda/impl/prefill_params.h"
#include "turboquant/cuda/impl/warp.cuh"
#include "turboquant/cuda/impl/wgmma.cuh"

namespace turboquant::cuda {

/// A block's rows, its part of the cells, and what its rows see.
struct PrefillWork {
    const PrefillParams& p;
    int seq, split, kv_head, first_row, n_kv, panel_begin, panel_end;

    __device__ __forceinline__ explicit PrefillWork(const PrefillParams& params) : p(params) {
        // The last rows see most: they go first.
        first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kPrefillRows;
        kv_head = blockIdx.y, seq = blockIdx.z / p.n_splits, split = blockIdx.z % p.n_splits;
        n_kv = p.a.seq_n_kv ? min(p.a.seq_n_kv[seq], p.a.n_kv) : p.a.n_kv;
        const int last_row = min(first_row + kPrefillRows, p.a.n_rows) - 1;
        const int begin = visible_begin(min(first_row, last_row)) / kPanelKeys;
        const int end = last_shown((visible_end(last_row) + kPanelKeys - 1) / kPanelKeys, first_row / p.a.group, last_row / p.a.group);
        const int n = max(0, end - begin);
        panel_begin = begin + n * split / p.n_splits, panel_end = begin + n * (split + 1) / p.n_splits;
    }
    /// The end of the panels that some query of the block sees by the mask, at most `end`: of the batch's own cells the first see few.
    __device__ __forceinline__ int last_shown(int end, int token, int last_token) const {
        if (!p.a.mask_tiles) return end;
        const int n_tiles = (p.a.n_kv + kTileKeys - 1) / kTileKeys, lane = threadIdx.x & 31;
        const uint8_t* flags = p.a.mask_tiles + static_cast<std::size_t>(seq * p.a.n_tokens + token) * n_tiles;
        for (; end > 0; end -= 32) {
            unsigned seen = 0;
            const int tile = 2 * (end - 1 - lane);
#pragma unroll 4
            for (int i = 0; tile >= 0 && i <= last_token - token; ++i) {
                seen |= flags[i * n_tiles + tile];
                if (tile + 1 < n_tiles) seen |= flags[i * n_tiles + tile + 1];
            }
            const unsigned shown = __ballot_sync(~0u, (seen & kMaskShows) != 0);
            if (shown) return end - (__ffs(static_cast<int>(shown)) - 1);
        }
        return 0;
    }
    __device__ __forceinline__ int position_of(int row) const { return n_kv - p.a.n_tokens + row / p.a.group; }
    __device__ __forceinline__ int visible_end(int row) const { return p.a.causal ? min(n_kv, position_of(row) + 1) : n_kv; }
    __device__ __forceinline__ int visible_begin(int row) const { return p.a.window > 0 ? max(0, position_of(row) + 1 - p.a.window) : 0; }
    __device__ __forceinline__ std::size_t unit() const { return static_cast<std::size_t>(seq) * p.a.n_head_kv + kv_head; }
};

/// Barriers in shared memory: full and empty ones of the stages of keys and values, and one for the queries.
template <bool kWide>
struct PanelRing {
    uint8_t* const shared;
    static constexpr PrefillShared l = prefill_shared(kWide);
    static constexpr int kStages = panel_stages(kWide), kKeys = key_bytes(kWide);
    __device__ __forceinline__ uint64_t* barrier(int i) const { return reinterpret_cast<uint64_t*>(shared + l.barriers) + i; }
    __device__ __forceinline__ uint64_t* queries() const { return barrier(4 * kStages); }
    __device__ __forceinline__ uint64_t* full(int stage, bool values) const { return barrier(2 * stage + values); }
    __device__ __forceinline__ uint64_t* empty(int stage, bool values) const { return barrier(2 * kStages + 2 * stage + values); }
};

/// One thread: queries once, then panels as stages fall empty.
template <int D, bool kWide>
__device__ __forceinline__ void fetch_panels(const PrefillWork& work, const PanelRing<kWide>& ring) {
    constexpr PanelLayout l = panel_layout(D, kWide);
    const PrefillParams& p = work.p;
    constexpr int kQueries = kPrefillGroups * 2 * kQueryPlane;
    barrier_expect(ring.queries(), kQueries);
    copy_bulk(ring.shared + ring.l.queries, p.queries + (work.unit() * p.n_groups + work.first_row / kGroupRows) * (2 * kQueryPlane), kQueries, ring.queries());
    const uint8_t* panel = p.panels + (work.unit() * p.n_panels + work.panel_begin) * l.bytes;
    int stage = 0;
    uint32_t parity = 1;
    for (int i = work.panel_begin; i < work.panel_end; ++i, panel += l.bytes) {
        barrier_wait(ring.empty(stage, false), parity);
        barrier_expect(ring.full(stage, false), ring.kKeys + kKeyScaleBytes);
        copy_bulk(ring.shared + ring.l.keys + stage * ring.kKeys, panel + l.keys, ring.kKeys, ring.full(stage, false));
        copy_bulk(ring.shared + ring.l.key_scales + stage * kKeyScaleBytes, panel + l.key_scales, kKeyScaleBytes, ring.full(stage, false));
        barrier_wait(ring.empty(stage, true), parity);
        barrier_expect(ring.full(stage, true), value_plane(D) + kValueScaleBytes);
        copy_bulk(ring.shared + ring.l.values + stage * kKeyPlane, panel + l.values, value_plane(D), ring.full(stage, true));
        copy_bulk(ring.shared + ring.l.value_scales + stage * kValueScaleBytes, panel + l.value_scales, kValueScaleBytes, ring.full(stage, true));
        if (++stage == ring.kStages) stage = 0, parity ^= 1;
    }
}

__device__ __forceinline__ float joined(int high, int low) { return static_cast<float>(high * 256 + low); }

/// o += (256 high + low) * factor for the columns from kFirst on; factors of rows g and g + 8.
template <int kFirst, int n, int kAll>
__device__ __forceinline__ void add_joined(float (&o)[kAll], const int (&high)[n], const int (&low)[n], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < n; ++i) o[kFirst / 2 + i] = fmaf(joined(high[i], low[i]), factor[i / 2 % 2], o[kFirst / 2 + i]);
}

/// Rows of a warpgroup: row 16*warp + g (+ 8) and columns 8j + 2t (+ 1) of a thread, as the instructions have it: index 4j + 2*(row) + c.
template <int D, bool kGeneral, bool kWide>
struct PrefillRows {
    static constexpr int kFirst = (D + 31) / 32 * 16, kSecond = D - kFirst;  // columns of the two halves of the second product
    const PrefillWork& work;
    const PanelRing<kWide>& ring;
    const int group, thread, g, t;
    int row[2];

    __device__ __forceinline__ PrefillRows(const PrefillWork& w, const PanelRing<kWide>& r, int group_of_block)
        : work(w), ring(r), group(group_of_block), thread(threadIdx.x & 127), g(threadIdx.x >> 2 & 7), t(threadIdx.x & 3) {
        row[0] = work.first_row + group * kGroupRows + thread / 32 * 16 + g, row[1] = row[0] + 8;
    }

    __device__ __forceinline__ float slope_of(int r) const { return mask_slope(work.p.a, work.kv_head * work.p.a.group + r % work.p.a.group); }

    /// This warp has read all of a stage. Every warp says so: they read scales, each at its own pace.
    __device__ __forceinline__ void leave(uint64_t* empty) const {
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(empty);
    }

    /// Cell of a thread's column, within a panel.
    __device__ __forceinline__ int cell_at(int j, int c) const { return (j & 8) * 8 + (j & 4 ? 8 * (j & 7) + 2 * t + c : 8 * (j & 7) + 7 - 2 * t - c); }

    __device__ __forceinline__ void run() {
        const AttentionParams& p = work.p.a;
        float o[D / 2], most[2] = {-1e30f, -1e30f}, sum[2] = {};
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i] = 0;
        const float* units = work.p.units + work.unit() * work.p.n_groups * kGroupRows;
        const float unit[2] = {units[row[0]], units[row[1]]};
        const int last = p.n_rows - 1, first_of_group = work.first_row + group * kGroupRows;
        const int begin[2] = {work.visible_begin(min(row[0], last)), work.visible_begin(min(row[1], last))},
                  end[2] = {work.visible_end(min(row[0], last)), work.visible_end(min(row[1], last))};
        const int full_begin = work.visible_begin(min(first_of_group + kGroupRows - 1, last)), full_end = work.visible_end(min(first_of_group, last));
        const uint64_t q_high = operand_descriptor(shared_address(ring.shared + ring.l.queries) + group * 2 * kQueryPlane),
                       q_low = q_high + kQueryPlane / 16, keys = operand_descriptor(shared_address(ring.shared + ring.l.keys)),
                       values = operand_descriptor(shared_address(ring.shared + ring.l.values));
        barrier_wait(ring.queries(), 0);
        int stage = 0;
        uint32_t parity = 0;
        // What the mask says of a panel to the rows of this warp: lanes have a token and one of the panel's tiles each.
        const int warp_row = first_of_group + thread / 32 * 16, lane = thread & 31, token = min(warp_row, last) / p.group + lane / 2,
                  n_tiles = (p.n_kv + kTileKeys - 1) / kTileKeys;
        const bool asks = kGeneral && p.mask_tiles && token <= min(warp_row + 15, last) / p.group;
        const uint8_t* flags = p.mask_tiles + static_cast<std::size_t>(work.seq * p.n_tokens + token) * n_tiles + (lane & 1);
        const auto ask = [&](int panel) -> unsigned {
            if (!kGeneral || !p.mask_tiles) return kMaskCounts;
            return asks && 2 * panel + (lane & 1) < n_tiles && panel < work.panel_end ? flags[2 * panel] : 0;
        };
        unsigned ahead = ask(work.panel_begin);
#pragma unroll 1
        for (int panel = work.panel_begin; panel < work.panel_end; ++panel) {
            const unsigned seen = kGeneral ? __reduce_or_sync(~0u, ahead) : 0;
            ahead = ask(panel + 1);
            float x[64];
            {
                int high[64], low[64];
                barrier_wait(ring.full(stage, false), parity);
                const uint64_t k = keys + stage * (ring.kKeys / 16);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < (D + 31) / 32; ++i) wgmma_s8(high, q_high + 2 * i, k + 2 * i, i > 0);
#pragma unroll
                for (int i = 0; i < (D + 31) / 32; ++i) wgmma_s8(low, q_low + 2 * i, k + 2 * i, i > 0);
                if constexpr (kWide) {  // the product of both low planes is less than what rounding leaves
#pragma unroll
                    for (int i = 0; i < (D + 31) / 32; ++i) wgmma_s8(low, q_high + 2 * i, k + kKeyPlane / 16 + 2 * i, true);
                }
                wgmma_commit();
                wgmma_wait<0>();
                hold(high), hold(low);
                const float2* scales = reinterpret_cast<const float2*>(ring.shared + ring.l.key_scales + stage * kKeyScaleBytes) + t;
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const float2 s = scales[4 * j];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        x[4 * j + 2 * r] = joined(high[4 * j + 2 * r], low[4 * j + 2 * r]) * s.x;
                        x[4 * j + 2 * r + 1] = joined(high[4 * j + 2 * r + 1], low[4 * j + 2 * r + 1]) * s.y;
                    }
                }
            }
            leave(ring.empty(stage, false));

            if constexpr (kGeneral) bend(panel, unit, x, (seen & kMaskCounts) != 0);
            const float by[2] = {kGeneral ? 1.f : unit[0], kGeneral ? 1.f : unit[1]};
            if (panel * kPanelKeys < full_begin || (panel + 1) * kPanelKeys > full_end) {
#pragma unroll
                for (int j = 0; j < 16; ++j)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int cell = panel * kPanelKeys + cell_at(j, c);
#pragma unroll
                        for (int r = 0; r < 2; ++r)
                            if (cell < begin[r] || cell >= end[r]) x[4 * j + 2 * r + c] = -INFINITY;
                    }
            }
            float top[2] = {x[0], x[2]}, panel_most[2], beta[2];
#pragma unroll
            for (int j = 0; j < 16; ++j)
#pragma unroll
                for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]));
            bool grown = false;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1)), top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
                panel_most[r] = fmaxf(top[r] * by[r], -1e30f);
                grown |= panel_most[r] > most[r];
            }
            if (__any_sync(~0u, grown)) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const float now = fmaxf(most[r], panel_most[r]), alpha = exp2_fast(most[r] - now);
                    sum[r] *= alpha, most[r] = now;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) o[4 * j + 2 * r] *= alpha, o[4 * j + 2 * r + 1] *= alpha;
                }
            }
            barrier_wait(ring.full(stage, true), parity);
            const float* value_scales = reinterpret_cast<const float*>(ring.shared + ring.l.value_scales + stage * kValueScaleBytes);
            const float2* shares = reinterpret_cast<const float2*>(value_scales + 4) + t;
            float total[2] = {};
#pragma unroll
            for (int r = 0; r < 2; ++r) beta[r] = exp2_fast(panel_most[r] - most[r]);
            uint32_t high[4][4], low[4][4];  // weights, operand registers of four steps of 32 keys
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // 16 keys: columns 8j + 2t + c, j = 2i, 2i + 1
                const float2 share[2] = {shares[8 * i], shares[8 * i + 4]};
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float w[2][2];
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const float e = exp2_fast(fmaf(x[8 * i + 4 * j + 2 * r + c], by[r], -panel_most[r]));
                            total[r] += e;
                            w[j][c] = fmaf(e, c ? share[j].y : share[j].x, 8388608.f);  // the low 16 bits are the weight
                        }
                    const uint32_t first = prmt(__float_as_uint(w[0][0]), __float_as_uint(w[1][0]), 0x5140),
                                   second = prmt(__float_as_uint(w[0][1]), __float_as_uint(w[1][1]), 0x5140);
                    low[i / 2][i % 2 * 2 + r] = prmt(first, second, 0x5410), high[i / 2][i % 2 * 2 + r] = prmt(first, second, 0x7632);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) sum[r] = fmaf(total[r], beta[r], sum[r]), beta[r] *= value_scales[0];
            {
                const uint64_t v = values + stage * (kKeyPlane / 16), v2 = v + kFirst * kPanelRow / 16;
                int a[kFirst / 2], a2[kFirst / 2], b[kSecond / 2], b2[kSecond / 2];
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_u8(a, high[i], v + 2 * i, i > 0);
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_u8(a2, low[i], v + 2 * i, i > 0);
                wgmma_commit();
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_u8(b, high[i], v2 + 2 * i, i > 0);
#pragma unroll
                for (int i = 0; i < 4; ++i) wgmma_u8(b2, low[i], v2 + 2 * i, i > 0);
                wgmma_commit();
                wgmma_wait<1>();
                hold(a), hold(a2);
                add_joined<0>(o, a, a2, beta);
                wgmma_wait<0>();
                hold(b), hold(b2);
                leave(ring.empty(stage, true));
                add_joined<kFirst>(o, b, b2, beta);
            }
            if (++stage == ring.kStages) stage = 0, parity ^= 1;
        }
        write(o, most, sum);
    }

    /// What is done to a logit beyond its product: soft-cap and mask; x becomes a logit in units of log2.
    __device__ __forceinline__ void bend(int panel, const float (&unit)[2], float (&x)[64], bool mask_counts) const {
        const AttentionParams& p = work.p.a;
        // Step by step: a branch around one logit's part would cost each its own fetch of instructions.
#pragma unroll
        for (int i = 0; i < 64; ++i) x[i] *= unit[i / 2 % 2];
        if (p.softcap != 0) {
            const float cap = p.softcap * kLog2e, inverse_cap = 1 / cap;
#pragma unroll
            for (int i = 0; i < 64; ++i) x[i] = cap * tanhf(x[i] * inverse_cap);
        }
        if (!p.mask || !mask_counts) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = min(row[r], p.n_rows - 1);
            const float slope = slope_of(at);
            const uint16_t* m = p.mask + work.seq * p.mask_seq_stride + at / p.group * p.mask_token_stride +
                                (work.kv_head * p.group + at % p.group) % p.mask_heads * p.mask_head_stride + panel * kPanelKeys;
            const int n = work.n_kv - panel * kPanelKeys;
#pragma unroll
            for (int j = 0; j < 16; ++j)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int cell = cell_at(j, c);
                    float& y = x[4 * j + 2 * r + c];
                    if (cell < n) y = fmaf(__half2float(__ushort_as_half(m[cell])), slope, y);
                }
        }
    }

    /// The part of these rows: unnormalized, with the largest logit and the sum of weights.
    __device__ __forceinline__ void write(const float (&o)[D / 2], const float (&most)[2], float (&sum)[2]) const {
        const PrefillParams& p = work.p;
        const uint8_t* codec = p.a.v.head_codec;
        const float step = p.a.table[codec ? codec[work.kv_head] : p.a.v.codec].step;
        const std::size_t first =
            ((static_cast<std::size_t>(work.seq) * p.n_parts + work.split) * p.a.n_head_kv + work.kv_head) * p.n_groups * kGroupRows;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(~0u, sum[r], 1), sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
            if (row[r] >= p.a.n_rows) continue;
            float* to = p.part + (first + row[r]) * D + 2 * t;
#pragma unroll
            for (int j = 0; j < D / 8; ++j) *reinterpret_cast<float2*>(to + 8 * j) = make_float2(o[4 * j + 2 * r] * step, o[4 * j + 2 * r + 1] * step);
            if (t == 0) p.part_ml[first + row[r]] = make_float2(most[r], sum[r]);
        }
    }
};

/// grid: blocks of 128 rows, kv heads, sequences * splits.
template <int D, bool kGeneral, bool kWide>
__global__ void __launch_bounds__(kPrefillThreads, 1) prefill_kernel(const __grid_constant__ PrefillParams p) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const PanelRing<kWide> ring{shared};
    if (threadIdx.x == 0) {
        for (int i = 0; i < ring.kStages; ++i)
            for (const bool values : {false, true}) barrier_init(ring.full(i, values), 1), barrier_init(ring.empty(i, values), 4 * kPrefillGroups);
        barrier_init(ring.queries(), 1);
        barriers_ready();
    }
    __syncthreads();
    const PrefillWork work(p);
    if (threadIdx.x < 128) {
        give_registers<24>();
        if (threadIdx.x == 0) fetch_panels<D>(work, ring);
    } else {
        take_registers<240>();
        PrefillRows<D, kGeneral, kWide>(work, ring, threadIdx.x / 128 - 1).run();
    }
}

}  // namespace turboquant::cuda
