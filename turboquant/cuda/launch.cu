#include "turboquant/cuda/impl/launch.h"

#include <map>
#include <mutex>
#include <utility>

namespace turboquant::cuda {
namespace {

/// Whether a kernel, as it was loaded, has the instructions that wait.
bool can_wait(const void* kernel) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, bool> known;
    int device = 0;
    if (cudaGetDevice(&device)) return false;
    const std::scoped_lock lock(mutex);
    const auto [at, made] = known.try_emplace({device, kernel}, false);
    cudaFuncAttributes a{};
    if (made && cudaFuncGetAttributes(&a, kernel) == cudaSuccess) at->second = a.ptxVersion >= 90 && a.binaryVersion >= 90;
    return at->second;
}

}  // namespace

Status allow_shared(const void* kernel, std::size_t bytes, const char* what) {
    static std::mutex mutex;
    static std::map<std::pair<int, const void*>, std::size_t> allowed;
    int device = 0;
    if (const auto e = cudaGetDevice(&device)) return status_of(e, "cudaGetDevice");
    const std::scoped_lock lock(mutex);
    std::size_t& limit = allowed[{device, kernel}];
    if (bytes <= limit) return {};
    if (const auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes))) return status_of(e, what);
    limit = bytes;
    return {};
}

Status launch(const void* kernel, dim3 grid, dim3 block, void** args, std::size_t shared, Stream stream, bool beside, const char* what) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    if (beside && can_wait(kernel)) config.attrs = &attribute, config.numAttrs = 1;
    return status_of(cudaLaunchKernelExC(&config, kernel, args), what);
}

}  // namespace turboquant::cuda
