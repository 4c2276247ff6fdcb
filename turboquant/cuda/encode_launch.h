// Between the plan and the translation units of the kernels.
#pragma once

#include "turboquant/cuda/impl/encode_call.h"
#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

/// Lets blocks of a head size have so much shared memory.
Status allow_scalar_shared(int head_dim, std::size_t bytes);
Status allow_trellis_shared(int head_dim, std::size_t bytes);
/// These return a cudaError_t.
int launch_scalar(const EncodeCall& call, int head_dim, int n_head, int blocks, std::size_t shared, Stream stream);
int launch_raw(const EncodeCall& call, int n_head, Stream stream);
int launch_trellis(const EncodeCall& call, int head_dim, int n_head, int blocks, int warps, Stream stream);
int launch_scalar(const EncodeCalls& calls, int n, int head_dim, int n_head, int blocks, std::size_t shared, Stream stream);
int launch_trellis(const EncodeCalls& calls, int n, int head_dim, int n_head, int blocks, int warps, Stream stream);

std::size_t scalar_shared(const FormatTables& tables);
std::size_t trellis_shared(int head_dim, int warps);

/// Vectors that a warp of the trellis kernel takes.
int trellis_vectors();

}  // namespace turboquant::cuda
