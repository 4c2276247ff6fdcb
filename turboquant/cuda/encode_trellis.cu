#include <cuda_runtime_api.h>

#include "turboquant/cuda/encode_launch.h"
#include "turboquant/cuda/impl/encode_trellis.h"
#include "turboquant/cuda/impl/launch.h"

namespace turboquant::cuda {
namespace {

template <int tiles>
__global__ void __launch_bounds__(128) trellis_kernel(const __grid_constant__ EncodeCall call) {
    extern __shared__ __align__(16) std::uint8_t shared[];
    encode_trellis<tiles>(call, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                          {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, shared);
}

template <int tiles>
__global__ void __launch_bounds__(128) trellis_calls_kernel(const __grid_constant__ EncodeCalls calls) {
    extern __shared__ __align__(16) std::uint8_t shared[];
    encode_trellis<tiles>(calls.of[blockIdx.z], static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                          {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, shared);
}

struct Kernels {
    void (*one)(EncodeCall);
    void (*several)(EncodeCalls);
};
Kernels trellis_kernels_for(int head_dim) {
    switch (column_tiles(head_dim)) {
        case 1:
            return {trellis_kernel<1>, trellis_calls_kernel<1>};
        case 2:
            return {trellis_kernel<2>, trellis_calls_kernel<2>};
        case 4:
            return {trellis_kernel<4>, trellis_calls_kernel<4>};
        default:
            return {trellis_kernel<5>, trellis_calls_kernel<5>};
    }
}

}  // namespace

Status allow_trellis_shared(int head_dim, std::size_t bytes) {
    const Kernels kernels = trellis_kernels_for(head_dim);
    for (const void* kernel : {reinterpret_cast<const void*>(kernels.one), reinterpret_cast<const void*>(kernels.several)})
        if (const Status status = allow_shared(kernel, bytes, "encode: shared memory"); !status.ok()) return status;
    return {};
}

int launch_trellis(const EncodeCall& call, int head_dim, int n_head, int blocks, int warps, Stream stream) {
    trellis_kernels_for(head_dim).one<<<dim3(blocks, n_head), 32 * warps, trellis_shared_bytes(head_dim, warps),
                                       static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
}
int launch_trellis(const EncodeCalls& calls, int n, int head_dim, int n_head, int blocks, int warps, Stream stream) {
    trellis_kernels_for(head_dim).several<<<dim3(blocks, n_head, n), 32 * warps, trellis_shared_bytes(head_dim, warps),
                                           static_cast<cudaStream_t>(stream)>>>(calls);
    return cudaGetLastError();
}

std::size_t trellis_shared(int head_dim, int warps) { return trellis_shared_bytes(head_dim, warps); }
int trellis_vectors() { return kTrellisVectors; }

}  // namespace turboquant::cuda
