// The two products of a tile: scores of its keys, and the sum of its values by weights. Codes are the A operand, 16 rows; queries and
// weights are B, 8 columns: columns 2r, 2r+1 are the high and low parts of row r of a group of four, so that both arrive in the lanes t = r.
#pragma once

#include "turboquant/cuda/impl/formats.cuh"

namespace turboquant::cuda {

/// Query operands of kGroups groups of four rows, in shared memory [group][register][lane], and in registers where they are few.
/// Register of a step of 32 dims: 2 per step, n = head_dim/16 in all (raw: 2 per step of 16, 2n in all).
template <int D, int kGroups>
struct QueryOperand {
    static constexpr int n = fragment_rows(D);
    static constexpr bool kInRegisters = n * kGroups <= 16;
    const uint32_t* shared;  // of this lane
    uint32_t reg[kInRegisters ? n * kGroups : 1];

    __device__ __forceinline__ void load() {
        if constexpr (kInRegisters) {
#pragma unroll
            for (int i = 0; i < n * kGroups; ++i) reg[i] = shared[32 * (2 * n * (i / n) + i % n)];
        }
    }
    __device__ __forceinline__ uint32_t operator()(int group, int i) const {
        if constexpr (kInRegisters) return reg[group * n + i];
        return shared[32 * (2 * n * group + i)];
    }
    __device__ __forceinline__ uint32_t half(int group, int i) const { return shared[32 * (2 * n * group + i)]; }
};

/// Adds the products of one A operand (two, if the format has second bytes) to the accumulators.
template <CodecId F, bool kUnsigned>
__device__ __forceinline__ void multiply(int (&c)[4], int (&c2)[4], const uint32_t (&a)[4], const uint32_t (&a2)[4], uint32_t b0, uint32_t b1) {
    mma_s8<kUnsigned>(c, a[0], a[1], a[2], a[3], b0, b1);
    if constexpr (operands_of(F) == Operands::sum) mma_s8<kUnsigned>(c, a2[0], a2[1], a2[2], a2[3], b0, b1);
    if constexpr (operands_of(F) == Operands::signs || operands_of(F) == Operands::wide)
        mma_s8<kUnsigned>(c2, a2[0], a2[1], a2[2], a2[3], b0, b1);
}

/// The sum of both columns of a row: 256 * high + low.
template <CodecId F>
__device__ __forceinline__ float join(int high, int low, int high2, int low2) {
    if constexpr (operands_of(F) == Operands::signs) return static_cast<float>((high - high2) * 256 + (low - low2));
    if constexpr (operands_of(F) == Operands::wide) return fmaf(static_cast<float>(high2 * 256 + low2), 256.f, static_cast<float>(high * 256 + low));
    return static_cast<float>(high * 256 + low);
}

/// x[group][e]: integer scores of the key at position 8e + g with row t of each group (raw: float scores).
template <CodecId F, int D, int kGroups, int kAhead>
__device__ __forceinline__ void scores(const uint32_t* table, const uint32_t* lut, const uint8_t* tile, const uint4 (&ahead)[kAhead],
                                       const QueryOperand<D, kGroups>& q, int lane, float (&x)[kGroups][8]) {
    constexpr int n = fragment_rows(D), kSteps = n / 2;  // whole steps of 32 dims
    if constexpr (F == CodecId::raw) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            float c[kGroups][4] = {};
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const int at = pair * n + i;
                const uint4 a = at < kAhead ? ahead[at < kAhead ? at : 0] : load_streaming(tile + at * 512 + lane * 16);
#pragma unroll
                for (int s = 0; s < kGroups; ++s) mma_f16(c[s], a, q.half(s, 2 * i), q.half(s, 2 * i + 1));
            }
#pragma unroll
            for (int s = 0; s < kGroups; ++s) x[s][2 * pair] = c[s][0] + c[s][1], x[s][2 * pair + 1] = c[s][2] + c[s][3];
        }
    } else if constexpr (is_trellis(F)) {
        LaneWords<F, Side::key, D, kAhead> w(tile, lane, ahead);
        uint32_t u[n + 7];
#pragma unroll
        for (int i = 0; i < n; ++i) u[7 + i] = w[i];
        fill_halo<Side::key, n>(u, lane);
        int c[kGroups][4][4] = {}, c2[kGroups][4][4] = {};
        constexpr int kPoints = bits_of(F) - 1;
#pragma unroll
        for (int i = 0; i < n; i += 2) {
            w.load_next(tile, lane, i / 2);
            uint32_t r[2][4][2], r2[2][4][2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (i + h >= n) continue;
                const Subsets z = subsets(u + 7 + i + h, F == CodecId::tcq4 ? w[n + kPoints * (i + h)] : 0);
#pragma unroll
                for (int k = 0; k < 4; ++k) octet<F, D>(table, lut, w, i + h, k, z, r[h][k], r2[h][k]);
            }
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const int e0 = 2 * pair, e1 = e0 + 1;
#pragma unroll
                for (int s = 0; s < kGroups; ++s) {
                    if (i + 1 < n) {
                        const uint32_t a[4] = {r[0][e0 & 3][e0 >> 2], r[0][e1 & 3][e1 >> 2], r[1][e0 & 3][e0 >> 2], r[1][e1 & 3][e1 >> 2]};
                        const uint32_t a2[4] = {r2[0][e0 & 3][e0 >> 2], r2[0][e1 & 3][e1 >> 2], r2[1][e0 & 3][e0 >> 2], r2[1][e1 & 3][e1 >> 2]};
                        multiply<F, false>(c[s][pair], c2[s][pair], a, a2, q(s, i), q(s, i + 1));
                    } else {
                        mma_s8_half(c[s][pair], r[0][e0 & 3][e0 >> 2], r[0][e1 & 3][e1 >> 2], q(s, i));
                        if constexpr (operands_of(F) == Operands::sum)
                            mma_s8_half(c[s][pair], r2[0][e0 & 3][e0 >> 2], r2[0][e1 & 3][e1 >> 2], q(s, i));
                        if constexpr (operands_of(F) == Operands::signs)
                            mma_s8_half(c2[s][pair], r2[0][e0 & 3][e0 >> 2], r2[0][e1 & 3][e1 >> 2], q(s, i));
                    }
                }
            }
        }
#pragma unroll
        for (int s = 0; s < kGroups; ++s)
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const int *a = c[s][pair], *b = c2[s][pair];
                x[s][2 * pair] = join<F>(a[0], a[1], b[0], b[1]), x[s][2 * pair + 1] = join<F>(a[2], a[3], b[2], b[3]);
            }
    } else {
        LaneWords<F, Side::key, D, kAhead> w(tile, lane, ahead);
        const Subsets none{};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            w.load_next(tile, lane, pair);
            int c[kGroups][4] = {}, c2[kGroups][4] = {};
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                const int first = pair * n + i, second = first + kSteps;
                uint32_t r[2][2], r2[2][2];
                octet<F, D>(table, lut, w, first / 4, first % 4, none, r[0], r2[0]);
                octet<F, D>(table, lut, w, second / 4, second % 4, none, r[1], r2[1]);
                const uint32_t a[4] = {r[0][0], r[1][0], r[0][1], r[1][1]}, a2[4] = {r2[0][0], r2[1][0], r2[0][1], r2[1][1]};
#pragma unroll
                for (int s = 0; s < kGroups; ++s) multiply<F, false>(c[s], c2[s], a, a2, q(s, 2 * i), q(s, 2 * i + 1));
            }
            if constexpr (n % 2 == 1) {
                const int last = pair * n + n - 1;
                uint32_t r[2], r2[2];
                octet<F, D>(table, lut, w, last / 4, last % 4, none, r, r2);
#pragma unroll
                for (int s = 0; s < kGroups; ++s) {
                    mma_s8_half(c[s], r[0], r[1], q(s, n - 1));
                    if constexpr (operands_of(F) == Operands::sum) mma_s8_half(c[s], r2[0], r2[1], q(s, n - 1));
                    if constexpr (operands_of(F) == Operands::wide) mma_s8_half(c2[s], r2[0], r2[1], q(s, n - 1));
                }
            }
#pragma unroll
            for (int s = 0; s < kGroups; ++s)
                x[s][2 * pair] = join<F>(c[s][0], c[s][1], c2[s][0], c2[s][1]), x[s][2 * pair + 1] = join<F>(c[s][2], c[s][3], c2[s][2], c2[s][3]);
        }
    }
}

/// o[group][i] += beta[group] * sum over the tile's values of their levels by the 16-bit weights b[group][e/2] (raw: by x[group][e]); dims
/// 2n*g + i of row t of each group.
template <CodecId F, int D, int kGroups, int kAhead>
__device__ __forceinline__ void weigh(const uint32_t* table, const uint32_t* lut, const uint8_t* tile, const uint4 (&ahead)[kAhead],
                                      const float (&x)[kGroups][8], const uint32_t (&b)[kGroups][4], const float (&beta)[kGroups], int lane, float (&o)[kGroups][D / 8]) {
    constexpr int n = fragment_rows(D);
    if constexpr (F == CodecId::raw) {
        uint32_t pairs[kGroups][8];
#pragma unroll
        for (int s = 0; s < kGroups; ++s)
#pragma unroll
            for (int e = 0; e < 8; ++e) pairs[s][e] = movmatrix(split_half(x[s][e]));
#pragma unroll
        for (int row = 0; row < n; ++row) {
            float c[kGroups][4] = {};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int at = 4 * row + k;
                const uint4 a = at < kAhead ? ahead[at < kAhead ? at : 0] : load_streaming(tile + at * 512 + lane * 16);
#pragma unroll
                for (int s = 0; s < kGroups; ++s) mma_f16(c[s], a, pairs[s][2 * k], pairs[s][2 * k + 1]);
            }
#pragma unroll
            for (int s = 0; s < kGroups; ++s) {
                o[s][row] = fmaf(c[s][0] + c[s][1], beta[s], o[s][row]);
                o[s][row + n] = fmaf(c[s][2] + c[s][3], beta[s], o[s][row + n]);
            }
        }
    } else {
        LaneWords<F, Side::value, D, kAhead> w(tile, lane, ahead);
        constexpr bool kTrellis = is_trellis(F);
        constexpr int kPerRow = kTrellis ? bits_of(F) - 1 : bits_of(F);
        uint32_t u[kTrellis ? n + 7 : 8];
        if constexpr (kTrellis) {
#pragma unroll
            for (int i = 0; i < n; ++i) u[7 + i] = w[i];
            fill_halo<Side::value, n>(u, lane);
        }
#pragma unroll
        for (int row = 0; row < n; ++row) {
            w.load_next(tile, lane, row);
            Subsets z{};
            if constexpr (kTrellis) z = subsets(u + 7 + row, F == CodecId::tcq4 ? w[n + kPerRow * row] : 0);
            uint32_t r[4][2], r2[4][2];
#pragma unroll
            for (int k = 0; k < 4; ++k) octet<F, D>(table, lut, w, row, k, z, r[k], r2[k]);
            int c[kGroups][4] = {}, c2[kGroups][4] = {};
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const uint32_t a[4] = {r[k][0], r[k][1], r[k + 1][0], r[k + 1][1]}, a2[4] = {r2[k][0], r2[k][1], r2[k + 1][0], r2[k + 1][1]};
#pragma unroll
                for (int s = 0; s < kGroups; ++s) multiply<F, true>(c[s], c2[s], a, a2, b[s][k], b[s][k + 1]);
            }
#pragma unroll
            for (int s = 0; s < kGroups; ++s) {
                o[s][row] = fmaf(join<F>(c[s][0], c[s][1], c2[s][0], c2[s][1]), beta[s], o[s][row]);
                o[s][row + n] = fmaf(join<F>(c[s][2], c[s][3], c2[s][2], c2[s][3]), beta[s], o[s][row + n]);
            }
        }
    }
}

}  // namespace turboquant::cuda
