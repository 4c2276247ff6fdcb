// The rotation of codec/rotation.h, of one vector in shared memory, by one warp.
#pragma once

#include <cstdint>

namespace turboquant::cuda {

/// x = diag(after) T diag(before) x, D values. `hartley`: m*m, m the odd part of D.
template <int D>
__device__ __forceinline__ void rotate_row(float* x, int lane, const float* before, const float* after, const float* hartley) {
    constexpr int kPow2 = D & -D, kOdd = D / kPow2;
    for (int i = lane; i < D; i += 32) x[i] *= before[i];
    __syncwarp();
    for (int h = 1; h < kPow2; h *= 2) {
        for (int i = lane; i < D / 2; i += 32) {
            const int at = i / h * 2 * h + i % h;
            const float a = x[at], b = x[at + h];
            x[at] = a + b, x[at + h] = a - b;
        }
        __syncwarp();
    }
    if constexpr (kOdd > 1) {
        for (int i = lane; i < kPow2; i += 32) {
            float in[kOdd];
            for (int j = 0; j < kOdd; ++j) in[j] = x[j * kPow2 + i];
            for (int l = 0; l < kOdd; ++l) {
                float sum = 0;
                for (int j = 0; j < kOdd; ++j) sum = fmaf(hartley[l * kOdd + j], in[j], sum);
                x[l * kPow2 + i] = sum;
            }
        }
        __syncwarp();
    }
    const float norm = rsqrtf(static_cast<float>(kPow2));
    for (int i = lane; i < D; i += 32) x[i] *= after[i] * norm;
    __syncwarp();
}

/// The same for a power of two, in registers: lane l holds the values l + 32 i.
template <int D>
__device__ __forceinline__ void rotate_lanes(float (&v)[D / 32], int lane, const float* before, const float* after) {
    static_assert((D & (D - 1)) == 0);
    float out[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] *= before[lane + 32 * i], out[i] = after[lane + 32 * i];
#pragma unroll
    for (int h = 1; h < D / 32; h *= 2)
#pragma unroll
        for (int i = 0; i < D / 32; ++i)
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const float sign = lane & d ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) v[i] = fmaf(v[i], sign, __shfl_xor_sync(~0u, v[i], d));
    }
    const float norm = rsqrtf(static_cast<float>(D));
#pragma unroll
    for (int i = 0; i < D / 32; ++i) v[i] *= out[i] * norm;
}

}  // namespace turboquant::cuda
