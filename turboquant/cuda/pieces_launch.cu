#include <cuda_runtime_api.h>

#include "turboquant/cuda/impl/launch.h"
#include "turboquant/cuda/pieces.h"

namespace turboquant::cuda {
namespace {

__global__ void send_kernel(const __grid_constant__ Pieces p) {
    for (int i = 0, begin = 0; i < p.n; begin = p.end[i++]) {
        for (int k = begin + static_cast<int>(threadIdx.x); k < p.end[i]; k += static_cast<int>(blockDim.x)) p.to[i][k - begin] = p.words[k];
        __syncthreads();  // a later one may lie over it
    }
    __threadfence();  // the next kernel may begin as soon as this one's block is gone
}

}  // namespace

Status send(const Pieces& pieces, Stream stream) {
    void* args[] = {const_cast<Pieces*>(&pieces)};
    return launch(reinterpret_cast<const void*>(&send_kernel), dim3(1), dim3(256), args, 0, stream, false, "send pieces");
}

}  // namespace turboquant::cuda
