// The kernels there are: one per head size and number of row groups (shared_layout.h, kernel_groups), each in a translation unit of its
// own.
#pragma once

namespace turboquant::cuda {

/// A kernel for cudaLaunchKernel, or null.
const void* attend_instance(int head_dim, int groups);

}  // namespace turboquant::cuda
