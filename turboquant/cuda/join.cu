// Kernels that finish a call, of all head sizes that have one.
#include "turboquant/cuda/impl/join.cuh"

#include "turboquant/cuda/impl/instances.h"

namespace turboquant::cuda {

const void* join_instance(int head_dim, bool one_row) {
    const auto of = [one_row]<int D>() { return one_row ? reinterpret_cast<const void*>(&join_kernel<D, true>) : reinterpret_cast<const void*>(&join_kernel<D, false>); };
    switch (head_dim) {
        case 64: return of.operator()<64>();
        case 128: return of.operator()<128>();
        case 256: return of.operator()<256>();
        case 512: return of.operator()<512>();
        default: return nullptr;
    }
}

}  // namespace turboquant::cuda
