// The kernels there are, each in a translation unit of its own: per head size and number of row groups (shared_layout.h, kernel_groups) one
// for any formats, and of the common head sizes one per common format.
#pragma once

#include "turboquant/cuda/impl/shared_layout.h"

namespace turboquant::cuda {

/// A kernel for cudaLaunchKernel that serves calls of this kind: one for its format if there is one, else one for any; null: none.
const void* attend_instance(int head_dim, int groups, KernelKind kind);
/// The kernel that finishes a call (join.cuh): head sizes that are powers of two; null: none. `one_row`: the step makes one.
const void* join_instance(int head_dim, bool one_row);

}  // namespace turboquant::cuda
