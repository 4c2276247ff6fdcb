// The positional score term (attention/attention.h, ScoreTerm) of two tiles whose cells have successive positions.
//
// With c the middle of the two, 63.5 after the first one's position, a' = a cos(c w) + b sin(c w), b' = b cos(c w) - a sin(c w):
//   e(c +- (m + 1/2)) = C_m +- S_m,   C_m = sum a' cos((m + 1/2) w),   S_m = sum b' sin((m + 1/2) w),   m = 0..63:
// one constant panel for all tiles, heads and layers, two products of 64 rows. Terms of tens of logits must not cost accuracy, so both
// operands are in two fp16 parts: columns 2r, 2r+1 are the parts of a' or b' of row r, and the panel is there twice.
// The turn by c is that by 64 (p0/64), from a table, after one by p0%64 + 63.5, done once for a block. Turned coefficients are made by the
// whole warp, each once, and become operands by way of shared memory. Terms of both tiles then wait in the same place for their scores.
#pragma once

#include "turboquant/cuda/impl/alibi.cuh"
#include "turboquant/cuda/impl/params.h"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {

/// Rows of the turn table before those of 64-position blocks: 64 of single positions, one of 63.5.
inline constexpr int kTurnRows = 65;
/// Cosine and sine of a position: of its two digits, one turned by the other.
__device__ __forceinline__ float2 turn_at(const TermParams& p, int pos, int f) {
    const float2 unit = __ldg(p.turns + (pos & 63) * p.n_pad + f), by = __ldg(p.turns + static_cast<std::size_t>(kTurnRows + (pos >> 6)) * p.n_pad + f);
    return make_float2(unit.x * by.x - unit.y * by.y, unit.y * by.x + unit.x * by.y);
}

/// Cell of a tile at position 8e + g.
__device__ __forceinline__ int cell_at(int e, int g) { return e < 4 ? 8 * e + 7 - g : 8 * e + g; }

/// Coefficients of a row in shared memory, in float2: rows of eight lanes' loads meet all banks.
constexpr int term_row_stride(int n_pad) { return n_pad + 2; }

/// Coefficients of the same sum of cosines and sines, counted from a position that is turn further.
__device__ __forceinline__ float2 counted_from(float2 ab, float2 turn) {
    return make_float2(fmaf(ab.x, turn.x, ab.y * turn.y), fmaf(ab.y, turn.x, -ab.x * turn.y));
}

/// Column of row r's part among a warp's operands [step][column][t]: stores and loads of eight lanes meet all banks.
__device__ __forceinline__ int staged_column(int column) { return column ^ (column >> 1 & 1); }

/// A lane's places in its warp's staging, its rows of coefficients and of turns; kept, as they are asked for again and again.
struct TermLane {
    int coefficients, high, low, operands;  // in float2, uint4, uint4, uint4
    __device__ __forceinline__ TermLane(int lane, int n_pad) {
        const int t = lane & 3, row = lane >> 2 & 3, half = lane >> 4;
        coefficients = row * term_row_stride(n_pad) + 16 * half + 4 * t;
        high = 32 * half + 4 * staged_column(2 * row) + t, low = 32 * half + 4 * staged_column(2 * row + 1) + t;
        operands = 4 * staged_column(lane >> 2) + t;
        // Hidden from the compiler, which would rather make them anew.
        asm volatile("" : "+r"(coefficients), "+r"(high), "+r"(low), "+r"(operands));
    }
};

/// Turns the coefficients `ab` (rows [4], term_row_stride() apart) to the middle of the tiles that begin at 64 * block, and stages them.
template <int kSteps>
__device__ __forceinline__ void stage_turned(const TermParams& p, const TermLane& at, const float2* ab, int block, int lane, uint4* operands) {
    const int n_pad = kSteps > 0 ? 16 * kSteps : p.n_pad, half = lane >> 4;
    const float2* turns = p.turns + (static_cast<unsigned>(kTurnRows + block) * static_cast<unsigned>(n_pad) + 16 * half + 4 * (lane & 3));
    ab += at.coefficients;
    uint4 *high = operands + at.high, *low = operands + at.low;
#pragma unroll 2
    for (int step = 0; step < n_pad / 16; step += 2) {
        if (step + half >= n_pad / 16) break;
        const float4 *turn = reinterpret_cast<const float4*>(turns + 16 * step), *x = reinterpret_cast<const float4*>(ab + 16 * step);
        uint32_t of_high[4], of_low[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 by = __ldg(turn + i), from = x[i];
            const float2 u = counted_from(make_float2(from.x, from.y), make_float2(by.x, by.y)),
                         v = counted_from(make_float2(from.z, from.w), make_float2(by.z, by.w));
            const auto split = [&](float y, float z, uint32_t& of_high_part, uint32_t& of_low_part) {
                const __half2 h = __floats2half2_rn(y, z);
                const float2 back = __half22float2(h);
                of_high_part = bits_of(h), of_low_part = bits_of(__floats2half2_rn(y - back.x, z - back.y));
            };
            split(u.x, v.x, of_high[i], of_low[i]), split(u.y, v.y, of_high[2 + i], of_low[2 + i]);
        }
        high[32 * step] = make_uint4(of_high[0], of_high[1], of_high[2], of_high[3]);
        low[32 * step] = make_uint4(of_low[0], of_low[1], of_low[2], of_low[3]);
    }
    __syncwarp();
}

/// Terms of row t of one group, in the order of the keys of a lane, of a tile and the one after it: [tile][half][lane].
__device__ __forceinline__ void put_terms(uint4* terms, int tile, int lane, const float (&e)[8]) {
    terms[64 * tile + lane] = make_uint4(__float_as_uint(e[0]), __float_as_uint(e[1]), __float_as_uint(e[2]), __float_as_uint(e[3]));
    terms[64 * tile + 32 + lane] = make_uint4(__float_as_uint(e[4]), __float_as_uint(e[5]), __float_as_uint(e[6]), __float_as_uint(e[7]));
}
__device__ __forceinline__ void get_terms(const uint4* terms, int tile, int lane, float (&e)[8]) {
    const uint4 x = terms[64 * tile + lane], y = terms[64 * tile + 32 + lane];
    e[0] = __uint_as_float(x.x), e[1] = __uint_as_float(x.y), e[2] = __uint_as_float(x.z), e[3] = __uint_as_float(x.w);
    e[4] = __uint_as_float(y.x), e[5] = __uint_as_float(y.y), e[6] = __uint_as_float(y.z), e[7] = __uint_as_float(y.w);
}

/// Terms of two tiles, the first of which begins at position p0 = 64*block + what `ab` was turned by already, into `staged`.
/// panel: [step][part][cos, sin][16 rows]. kSteps: steps of 16 frequencies, 0: as many as `p` has.
template <int kSteps>
__device__ __forceinline__ void successive_terms(const TermParams& p, const TermLane& at, const uint4* panel, const float2* ab, int block, int lane, uint4* staged) {
    stage_turned<kSteps>(p, at, ab, block, lane, staged);
    const uint4* b = staged + at.operands;
    float cos_sum[4][4] = {}, sin_sum[4][4] = {};
    panel += lane;
    const auto add = [&](int step) {
        const uint4 of = b[32 * step];
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const uint4* a = panel + 512 * step + 256 * part;
#pragma unroll
            for (int m = 0; m < 4; ++m) mma_f16(cos_sum[m], a[32 * m], of.x, of.y), mma_f16(sin_sum[m], a[32 * (4 + m)], of.z, of.w);
        }
    };
    if constexpr (kSteps > 0) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) add(step);
    } else {
#pragma unroll 1
        for (int step = 0; step < p.n_pad / 16; ++step) add(step);
    }
    float before[8], after[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // m = 8i + g
        const float *c = &cos_sum[i / 2][i % 2 * 2], *d = &sin_sum[i / 2][i % 2 * 2];
        const float even = c[0] + c[1], odd = d[0] + d[1];
        after[i] = even + odd, before[7 - i] = even - odd;
    }
    __syncwarp();  // operands are read: terms take their place
    put_terms(staged, 0, lane, before), put_terms(staged, 1, lane, after);
}

/// Coefficients of frequency f < n_freq for a query row and term k: as they were made before (Term::q_term), or now of the offset `id`, as
/// query_term (step.h) does.
template <int D>
__device__ __forceinline__ float2 term_coefficients(const AttentionParams& p, int seq, int k, int id, int row, int kv_head, int f) {
    const TermParams& term = p.term;
    const int token = row / p.group, head = kv_head * p.group + row - token * p.group;
    if (term.q_term) {
        const float* q = term.q_term + seq * term.seq_stride + ((static_cast<std::size_t>(k) * p.n_tokens + token) * p.n_head + head) * 2 * term.n_freq;
        return make_float2(__ldg(q + f), __ldg(q + term.n_freq + f));
    }
    const float *q = p.q + seq * p.q_seq_stride + token * p.q_token_stride + head * p.q_head_stride,
                *mu = term.mu + id * term.mu_stride + 2 * D * kv_head;
    const int a = term.rope_offset + (term.rope_adjacent ? 2 * f : f), b = a + (term.rope_adjacent ? 1 : term.rope_pairs);
    return make_float2(q[a] * mu[a] + q[b] * mu[b], q[a] * mu[D + a] + q[b] * mu[D + b]);
}

/// The same for positions of any kind, key by key: slow. `first_row`: of the four; rows from n_rows on are not there.
template <int D>
__device__ __forceinline__ void scattered_term(const AttentionParams& p, int seq, int kv_head, int tile, int n_kv, int first_row, int lane,
                                            float (&e)[8]) {
    const TermParams& term = p.term;
    const int g = lane >> 2, t = lane & 3;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const int cell = tile * 64 + cell_at(i, g);
        const std::size_t at = seq * term.cell_seq_stride + cell;
        const int pos = cell < n_kv ? term.cell_pos[at] : -1, k = pos >= 0 && term.cell_term ? term.cell_term[at] : 0,
                  id = term.ids ? term.ids[seq * term.n_terms + k] : 0;
        float sum[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] = 0;
        if (pos >= 0)
#pragma unroll 1
            for (int f = t; f < term.n_freq; f += 4) {
                const auto [c, s] = turn_at(term, pos, f);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int row = first_row + r;
                    if (row >= p.n_rows) continue;
                    const float2 x = term_coefficients<D>(p, seq, k, id, row, kv_head, f);
                    sum[r] = fmaf(x.x, c, fmaf(x.y, s, sum[r]));
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
        for (int j = 0; j < 8; ++j)
            if (j == i) e[j] = mine * (p.scale * kLog2e);
    }
    __syncwarp();
}

}  // namespace turboquant::cuda
