// Launching a kernel, beside the one before it where that is allowed (programmatic dependent launch, sm_90).
#pragma once

#include <cuda_runtime_api.h>

#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

/// `beside`: the kernel may begin when all blocks of the launch before have called let_next_begin() (warp.cuh), and itself waits for the
/// end of that one where it must (wait_for_launch_before()). Kernels made for GPUs before sm_90 cannot wait: they begin after its end.
Status launch(const void* kernel, dim3 grid, dim3 block, void** args, std::size_t shared, Stream stream, bool beside, const char* what);

/// Lets blocks of a kernel have so much shared memory. Its limit only grows: other plans were promised theirs, and another thread may be
/// between this and its launch.
Status allow_shared(const void* kernel, std::size_t bytes, const char* what);

}  // namespace turboquant::cuda
