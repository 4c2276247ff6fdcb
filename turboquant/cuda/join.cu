// Kernels that finish a call, of all head sizes that have one.
#include "turboquant/cuda/impl/join.cuh"

#include "turboquant/cuda/impl/instances.h"

namespace turboquant::cuda {

const void* join_instance(int head_dim) {
    switch (head_dim) {
        case 64: return reinterpret_cast<const void*>(&join_kernel<64>);
        case 128: return reinterpret_cast<const void*>(&join_kernel<128>);
        case 256: return reinterpret_cast<const void*>(&join_kernel<256>);
        case 512: return reinterpret_cast<const void*>(&join_kernel<512>);
        default: return nullptr;
    }
}

}  // namespace turboquant::cuda
