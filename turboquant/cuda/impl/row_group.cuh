// The rotation of codec/rotation.h for head sizes that are powers of two, of several rows of a warp at once, in registers: a row is 16 values
// in each of a few lanes. One row a warp (rotate.cuh) waits for most of its shuffles; here there are several to wait for.
//
// A lane's values, index e: bits 0 and 1 of e are bits 0 and 1 of the dim, bits 2 and 3 those that are the byte within an operand's word of
// trellis formats. So a lane has four whole words of each order of operand bytes (operand_bytes.cuh, dim_of).
#pragma once

#include <cstdint>

#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {

template <int D>
struct RowGroup {
    static_assert(D == 64 || D == 128);
    static constexpr int kLanes = D / 16, kRows = 32 / kLanes;
    static constexpr int n = fragment_rows(D);
    const int row, lane, first;  ///< of the warp's rows; of the row's lanes; the lane's first dim

    __device__ __forceinline__ explicit RowGroup(int lane_of_warp)
        : row(lane_of_warp / kLanes), lane(lane_of_warp % kLanes), first(D == 128 ? lane % 2 * 4 + lane / 2 * 32 : lane * 16) {}

    __device__ __forceinline__ int dim(int e) const { return first + e / 4 * n + e % 4; }
    /// Word i of the lane's four, of a row of operand bytes.
    __device__ __forceinline__ int word(int i, bool trellis) const { return trellis ? first / (4 * n) * n + first % n + i : (first + i * n) / 4; }

    /// From a row in memory.
    __device__ __forceinline__ void load(const float* from, float (&v)[16]) const {
        const bool whole = reinterpret_cast<std::uintptr_t>(from) % 16 == 0;
#pragma unroll
        for (int e = 0; e < 16; e += 4) {
            const float* at = from + dim(e);
            const float4 four = whole ? *reinterpret_cast<const float4*>(at) : make_float4(at[0], at[1], at[2], at[3]);
            v[e] = four.x, v[e + 1] = four.y, v[e + 2] = four.z, v[e + 3] = four.w;
        }
    }
    /// Hadamard transform of the rows, not normalized.
    __device__ __forceinline__ void butterflies(float (&v)[16]) const {
#pragma unroll
        for (int h = 1; h < 16; h *= 2)
#pragma unroll
            for (int e = 0; e < 16; ++e)
                if (!(e & h)) {
                    const float a = v[e], b = v[e + h];
                    v[e] = a + b, v[e + h] = a - b;
                }
#pragma unroll
        for (int h = 1; h < kLanes; h *= 2) {
            const float sign = lane & h ? -1.f : 1.f;
#pragma unroll
            for (int e = 0; e < 16; ++e) v[e] = fmaf(v[e], sign, __shfl_xor_sync(~0u, v[e], h));
        }
    }
    /// diag(after) T diag(before) v: signs of all dims.
    __device__ __forceinline__ void rotate(float (&v)[16], const float* before, const float* after) const {
        float signs[16];
        load(before, signs);
#pragma unroll
        for (int e = 0; e < 16; ++e) v[e] *= signs[e];
        butterflies(v);
        load(after, signs);
        const float norm = rsqrtf(static_cast<float>(D));
#pragma unroll
        for (int e = 0; e < 16; ++e) v[e] *= signs[e] * norm;
    }
    /// The largest absolute value of the row, in all its lanes.
    __device__ __forceinline__ float largest(const float (&v)[16]) const {
        float top = fmaxf(fabsf(v[0]), fabsf(v[1]));
#pragma unroll
        for (int e = 2; e < 16; ++e) top = fmaxf(top, fabsf(v[e]));
#pragma unroll
        for (int h = 1; h < kLanes; h *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, h));
        return top;
    }
};

/// Byte b of word i becomes byte i of word b.
__device__ __forceinline__ void transpose_bytes(uint32_t (&w)[4]) {
    const uint32_t a = prmt(w[0], w[1], 0x5140), b = prmt(w[2], w[3], 0x5140), c = prmt(w[0], w[1], 0x7362), d = prmt(w[2], w[3], 0x7362);
    w[0] = prmt(a, b, 0x5410), w[1] = prmt(a, b, 0x7632), w[2] = prmt(c, d, 0x5410), w[3] = prmt(c, d, 0x7632);
}

/// Integers of 15 bits as bytes, high and low ones, word i of e = 4i .. 4i + 3. |x| at most kPrefillTop.
__device__ __forceinline__ void split_bytes(const float (&x)[16], float by, uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t y[4];  // the low 16 bits are the integer; rounding to a signed low byte carries into the high one
#pragma unroll
        for (int b = 0; b < 4; ++b) y[b] = __float_as_uint(fmaf(x[4 * i + b], by, 12582912.f));
        low[i] = prmt(prmt(y[0], y[1], 0x0040), prmt(y[2], y[3], 0x0040), 0x5410);
#pragma unroll
        for (int b = 0; b < 4; ++b) y[b] += 128;
        high[i] = prmt(prmt(y[0], y[1], 0x0051), prmt(y[2], y[3], 0x0051), 0x5410);
    }
}

}  // namespace turboquant::cuda
