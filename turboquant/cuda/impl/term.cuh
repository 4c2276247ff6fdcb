// The positional score term (attention/attention.h, ScoreTerm) of a tile.
//
// Successive positions p0 + cell: with c = p0 + 31.5 the middle, a' = a cos(c w) + b sin(c w), b' = b cos(c w) - a sin(c w),
//   e(c +- (m + 1/2)) = C_m +- S_m,   C_m = sum a' cos((m + 1/2) w),   S_m = sum b' sin((m + 1/2) w),   m = 0..31:
// one constant panel for all tiles, heads and layers, two products of 32 rows. Everything is in two fp16 parts (terms of tens of logits
// must not cost accuracy): columns 2r, 2r+1 are the parts of a' or b' of row r, and the panel is there twice.
// The turn by c is that by 64 (p0/64), from a table, after one by p0%64 + 31.5, done once for a block.
#pragma once

#include "turboquant/cuda/impl/params.h"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {

/// Rows of the turn table before those of 64-position blocks: 64 of single positions, one of 31.5.
inline constexpr int kTurnRows = 65;

/// Cell of a tile at position 8e + g.
__device__ __forceinline__ int cell_at(int e, int g) { return e < 4 ? 8 * e + 7 - g : 8 * e + g; }

__device__ __forceinline__ float2 turned(float2 ab, float2 turn) {
    return make_float2(fmaf(ab.x, turn.x, ab.y * turn.y), fmaf(ab.y, turn.x, -ab.x * turn.y));
}

/// e[e] for row t, of a tile that begins at position p0 = 64*block + what `ab` ([4 rows][n_pad]) was turned by already.
__device__ __forceinline__ void successive_term(const TermParams& p, const uint4* panel, const float2* ab, int block, int lane, float (&e)[8]) {
    const int g = lane >> 2, t = lane & 3;
    const float2* turns = p.turns + static_cast<std::size_t>(kTurnRows + block) * p.n_pad + 2 * t;
    ab += (g >> 1) * p.n_pad + 2 * t;
    float cos_sum[2][4] = {}, sin_sum[2][4] = {};
    // The columns' parts: even ones hold the high halves, odd ones what these leave.
    const float low = g & 1 ? 1.f : 0.f;
    const auto turn_at = [&](int i) { return __ldg(reinterpret_cast<const float4*>(turns + 8 * i)); };
    float4 turn[2] = {turn_at(0), turn_at(1)};
#pragma unroll 2
    for (int step = 0; step < p.n_pad / 16; ++step) {
        const float4 now[2] = {turn[0], turn[1]};
        if (step + 1 < p.n_pad / 16) turn[0] = turn_at(2 * step + 2), turn[1] = turn_at(2 * step + 3);
        uint32_t a[2], b[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float4 x = *reinterpret_cast<const float4*>(ab + 16 * step + 8 * h);
            const float2 first = turned(make_float2(x.x, x.y), make_float2(now[h].x, now[h].y)),
                         second = turned(make_float2(x.z, x.w), make_float2(now[h].z, now[h].w));
            const auto part = [&](float u, float v) {
                const float2 high = __half22float2(__floats2half2_rn(u, v));
                return bits_of(__floats2half2_rn(fmaf(-low, high.x, u), fmaf(-low, high.y, v)));
            };
            a[h] = part(first.x, second.x), b[h] = part(first.y, second.y);
        }
        const uint4* at = panel + step * 8 * 32 + lane;  // [step][part][cos, sin][16 rows]
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                mma_f16(cos_sum[half], at[(part * 4 + half) * 32], a[0], a[1]);
                mma_f16(sin_sum[half], at[(part * 4 + 2 + half) * 32], b[0], b[1]);
            }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // m = 8i + g
        const float *c = &cos_sum[i / 2][i % 2 * 2], *d = &sin_sum[i / 2][i % 2 * 2];
        const float even = c[0] + c[1], odd = d[0] + d[1];
        e[4 + i] = even + odd, e[3 - i] = even - odd;
    }
}

/// The same for positions of any kind, key by key: slow. `first_row`: of the four; rows from n_rows on are not there.
__device__ __forceinline__ void scattered_term(const AttentionParams& p, int seq, int kv_head, int tile, int n_kv, int first_row, int lane,
                                            float (&e)[8]) {
    const TermParams& term = p.term;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const int cell = tile * 64 + cell_at(i, g);
        const std::size_t at = seq * term.cell_seq_stride + cell;
        const int pos = cell < n_kv ? term.cell_pos[at] : -1, id = pos >= 0 && term.cell_term ? term.cell_term[at] : 0;
        float sum[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] = 0;
        if (pos >= 0)
#pragma unroll 1
            for (int f = t; f < term.n_freq; f += 4) {
                const float2 unit = __ldg(term.turns + (pos & 63) * term.n_pad + f),
                             by = __ldg(term.turns + static_cast<std::size_t>(kTurnRows + (pos >> 6)) * term.n_pad + f);
                const float c = unit.x * by.x - unit.y * by.y, s = unit.y * by.x + unit.x * by.y;
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int row = first_row + r;
                    if (row >= p.n_rows) continue;
                    const float* q = term.q_term + seq * term.seq_stride +
                                     ((static_cast<std::size_t>(id) * p.n_tokens + row / p.group) * p.n_head + kv_head * p.group + row % p.group) * 2 * term.n_freq;
                    sum[r] = fmaf(__ldg(q + f), c, fmaf(__ldg(q + term.n_freq + f), s, sum[r]));
                }
            }
        float mine = 0;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float v = sum[r];
            v += __shfl_xor_sync(~0u, v, 1), v += __shfl_xor_sync(~0u, v, 2);
            mine = r == t ? v : mine;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k)
            if (k == i) e[k] = mine * (p.scale * 1.4426950408889634f);
    }
    __syncwarp();
}

}  // namespace turboquant::cuda
