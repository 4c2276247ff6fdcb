#include "turboquant/cuda/status.h"

#include <cuda_runtime_api.h>

namespace turboquant::cuda {

std::string Status::message() const {
    if (ok()) return {};
    if (!cuda) return where;
    const auto error = static_cast<cudaError_t>(cuda);
    return std::string(where) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

Status status_of(int cuda_error, const char* where) {
    if (!cuda_error) return {};
    cudaGetLastError();  // reported here: else a launch after it would be taken for the one that failed
    return {cuda_error, where};
}

Status count_devices(int& n) {
    n = 0;
    return status_of(cudaGetDeviceCount(&n), "cudaGetDeviceCount");
}

Status query_device(int index, Device& device) {
    cudaDeviceProp p;
    if (const cudaError_t error = cudaGetDeviceProperties(&p, index)) return status_of(error, "cudaGetDeviceProperties");
    device.index = index, device.name = p.name, device.compute_capability = 10 * p.major + p.minor, device.n_sm = p.multiProcessorCount;
    device.l2_bytes = static_cast<std::size_t>(p.l2CacheSize), device.memory_bytes = p.totalGlobalMem;
    device.shared_per_block = p.sharedMemPerBlockOptin;
    return {};
}

}  // namespace turboquant::cuda
