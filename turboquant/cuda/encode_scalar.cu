#include <cuda_runtime_api.h>

#include "turboquant/cuda/encode_launch.h"
#include "turboquant/cuda/impl/encode_scalar.h"
#include "turboquant/cuda/impl/launch.h"

namespace turboquant::cuda {
namespace {

template <int tiles>
__global__ void __launch_bounds__(kScalarThreads, tiles == 1 ? 8 : tiles == 2 ? 5 : 2) scalar_kernel(const __grid_constant__ EncodeCall call) {
    extern __shared__ __align__(16) std::uint8_t shared[];
    encode_scalar<tiles>(call, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                         {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, shared);
}

template <int tiles>
__global__ void __launch_bounds__(kScalarThreads, tiles == 1 ? 8 : tiles == 2 ? 5 : 2) scalar_calls_kernel(const __grid_constant__ EncodeCalls calls) {
    extern __shared__ __align__(16) std::uint8_t shared[];
    encode_scalar<tiles>(calls.of[blockIdx.z], static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                         {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, shared);
}

constexpr int kRawWarps = 4;
__global__ void __launch_bounds__(32 * kRawWarps) raw_kernel(const __grid_constant__ EncodeCall call) {
    encode_raw(call, static_cast<int>(blockIdx.x * kRawWarps + threadIdx.x / 32), static_cast<int>(blockIdx.y),
               {static_cast<int>(threadIdx.x % 32), 32});
}

struct Kernels {
    void (*one)(EncodeCall);
    void (*several)(EncodeCalls);
};
Kernels scalar_kernels_for(int head_dim) {
    switch (column_tiles(head_dim)) {
        case 1:
            return {scalar_kernel<1>, scalar_calls_kernel<1>};
        case 2:
            return {scalar_kernel<2>, scalar_calls_kernel<2>};
        case 4:
            return {scalar_kernel<4>, scalar_calls_kernel<4>};
        default:
            return {scalar_kernel<5>, scalar_calls_kernel<5>};
    }
}

}  // namespace

Status allow_scalar_shared(int head_dim, std::size_t bytes) {
    const Kernels kernels = scalar_kernels_for(head_dim);
    for (const void* kernel : {reinterpret_cast<const void*>(kernels.one), reinterpret_cast<const void*>(kernels.several)})
        if (const Status status = allow_shared(kernel, bytes, "encode: shared memory"); !status.ok()) return status;
    return {};
}

int launch_scalar(const EncodeCall& call, int head_dim, int n_head, int blocks, std::size_t shared, Stream stream) {
    scalar_kernels_for(head_dim).one<<<dim3(blocks, n_head), kScalarThreads, shared, static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
}
int launch_scalar(const EncodeCalls& calls, int n, int head_dim, int n_head, int blocks, std::size_t shared, Stream stream) {
    scalar_kernels_for(head_dim).several<<<dim3(blocks, n_head, n), kScalarThreads, shared, static_cast<cudaStream_t>(stream)>>>(calls);
    return cudaGetLastError();
}

int launch_raw(const EncodeCall& call, int n_head, Stream stream) {
    raw_kernel<<<dim3((call.n + kRawWarps - 1) / kRawWarps, n_head), 32 * kRawWarps, 0, static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
}

std::size_t scalar_shared(const FormatTables& f) { return scalar_shared_bytes(f.head_dim, f.bits, f.n_cells); }

}  // namespace turboquant::cuda
