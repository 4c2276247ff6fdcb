#include <cuda_runtime_api.h>

#include "turboquant/cuda/impl/masks.h"
#include "turboquant/cuda/masks.h"

namespace turboquant::cuda {
namespace {

constexpr int kThreads = 256;

/// A tile's cells by a block, whose warps take turns at the queries.
__global__ void __launch_bounds__(kThreads) see_cells_kernel(const __grid_constant__ SeeCells a) {
    __shared__ unsigned seen[2];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * 64;
    if (threadIdx.x < 2) seen[threadIdx.x] = 0;
    __syncthreads();
    bool any[2] = {};
#pragma unroll 4
    for (int t = warp; t < a.n_tokens; t += kThreads / 32)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int cell = first + 32 * h + lane;
            if (cell < a.n_kv) any[h] |= a.mask[t * a.token_stride + cell] != kMaskHidden;
        }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const unsigned bits = __ballot_sync(~0u, any[h]);
        if (lane == 0 && bits) atomicOr(&seen[h], bits);
    }
    __syncthreads();
    if (threadIdx.x == 0) a.seen[blockIdx.x] = seen[0] | static_cast<std::uint64_t>(seen[1]) << 32;
}

/// A query by a block.
__global__ void __launch_bounds__(kThreads) window_masks_kernel(const __grid_constant__ WindowMasks a) {
    __shared__ int own;
    const int row = blockIdx.x;
    if (threadIdx.x == 0) own = -1;
    __syncthreads();
    int last = -1;
    for (int s = threadIdx.x; s < a.n_slots; s += kThreads) last = max(last, seen_position(a, row, s));
    if (last >= 0) atomicMax(&own, last);
    const std::uint16_t* mask = mask_of(a, row);
    std::uint16_t* out = a.out + row * a.out_stride;
    constexpr int kAtOnce = 8;
    const bool aligned = (reinterpret_cast<std::uintptr_t>(mask) | reinterpret_cast<std::uintptr_t>(out)) % 16 == 0;
    const int whole = mask && aligned ? a.n_kv / kAtOnce * kAtOnce : 0;
    for (int at = kAtOnce * threadIdx.x; at < whole; at += kAtOnce * kThreads)
        *reinterpret_cast<uint4*>(out + at) = *reinterpret_cast<const uint4*>(mask + at);
    for (int at = whole + threadIdx.x; at < static_cast<int>(a.out_stride); at += kThreads) out[at] = cell_value(a, row, at);
    __syncthreads();
    for (int s = threadIdx.x; s < a.n_slots; s += kThreads) take_slot(a, row, own, s);
}

}  // namespace

Status see_cells(const SeeCells& a, Stream stream) {
    if (a.n_kv <= 0) return {};
    if (!a.mask || !a.seen) return bad_argument("see_cells: null pointer");
    see_cells_kernel<<<(a.n_kv + 63) / 64, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    return status_of(cudaGetLastError(), "see_cells");
}

Status window_masks(const WindowMasks& a, Stream stream) {
    if (a.n_seq * a.n_tokens == 0) return {};
    if (!a.cells || !a.positions || !a.out || !a.exact || (a.n_new && (!a.new_slots || !a.fresh || !a.old))) return bad_argument("window_masks: null pointer");
    window_masks_kernel<<<a.n_seq * a.n_tokens, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    return status_of(cudaGetLastError(), "window_masks");
}

}  // namespace turboquant::cuda
