#include <cuda_runtime_api.h>

#include "turboquant/cuda/encode_launch.h"
#include "turboquant/cuda/impl/encode_scalar.h"

namespace turboquant::cuda {
namespace {

template <int tiles>
__global__ void __launch_bounds__(kScalarThreads, tiles == 1 ? 8 : tiles == 2 ? 5 : 2) scalar_kernel(const __grid_constant__ EncodeCall call) {
    extern __shared__ __align__(16) std::uint8_t shared[];
    encode_scalar<tiles>(call, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y),
                         {static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)}, shared);
}

constexpr int kRawWarps = 4;
__global__ void __launch_bounds__(32 * kRawWarps) raw_kernel(const __grid_constant__ EncodeCall call) {
    encode_raw(call, static_cast<int>(blockIdx.x * kRawWarps + threadIdx.x / 32), static_cast<int>(blockIdx.y),
               {static_cast<int>(threadIdx.x % 32), 32});
}

using Kernel = void (*)(EncodeCall);
Kernel scalar_kernel_for(int head_dim) {
    switch (column_tiles(head_dim)) {
        case 1:
            return scalar_kernel<1>;
        case 2:
            return scalar_kernel<2>;
        case 4:
            return scalar_kernel<4>;
        default:
            return scalar_kernel<5>;
    }
}

}  // namespace

int allow_scalar_shared(int head_dim, std::size_t bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(scalar_kernel_for(head_dim)), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
}

int launch_scalar(const EncodeCall& call, int head_dim, int n_head, int blocks, std::size_t shared, Stream stream) {
    scalar_kernel_for(head_dim)<<<dim3(blocks, n_head), kScalarThreads, shared, static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
}

int launch_raw(const EncodeCall& call, int n_head, Stream stream) {
    raw_kernel<<<dim3((call.n + kRawWarps - 1) / kRawWarps, n_head), 32 * kRawWarps, 0, static_cast<cudaStream_t>(stream)>>>(call);
    return cudaGetLastError();
}

std::size_t scalar_shared(const FormatTables& f) { return scalar_shared_bytes(f.head_dim, f.bits, f.n_cells); }

}  // namespace turboquant::cuda
