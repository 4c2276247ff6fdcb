// ALiBi's slopes, as in ggml.
#pragma once

#include "turboquant/cuda/impl/params.h"

namespace turboquant::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;

/// What a mask's values are multiplied by for a query head, in units of log2; without ALiBi that is the unit alone.
__device__ __forceinline__ float mask_slope(const AttentionParams& p, int head) {
    if (p.max_bias == 0) return kLog2e;
    int n2 = 1;
    while (2 * n2 <= p.n_head) n2 *= 2;
    const float exponent = head < n2 ? -p.max_bias * (head + 1) / n2 : -p.max_bias / 2 * (2 * (head - n2) + 1) / n2;
    return kLog2e * exp2f(exponent);
}

}  // namespace turboquant::cuda
