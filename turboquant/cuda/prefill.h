// Prefill: attention of many query rows by warpgroup instructions, over panels that are decoded once per call (impl/prefill_params.h).
#pragma once

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/impl/params.h"

namespace turboquant::cuda {

/// Whether prefill can take calls of this shape: sm_90, head sizes to 128, more than 8 query tokens, formats that are known and whose levels
/// are single bytes.
bool prefill_can(const Device& device, const AttentionShape& shape);
/// Fills plan.prefill and lengthens the workspace. Sizes are checked already. `wide`: keys of 15 bits.
void plan_prefill(const Device& device, AttentionPlan& plan, bool wide);
inline constexpr int kMostExactTiles = 2048;
/// Whether a call can take it: a score term must be planned for and come with its offset, exact rows with what their mask says of tiles.
bool prefill_serves(const AttentionPlan& plan, const AttentionArgs& args);
/// Enqueues the call. `p`: as for the decode kernels, but for their own parts of the workspace. `codes_ready`: AttentionArgs.
Status run_prefill(const AttentionPlan& plan, const AttentionParams& p, void* codes_ready, void* workspace, Stream stream);

/// The kernel of a head size, for cudaLaunchKernel. `general`: with mask and soft-cap; `wide`: keys of 15 bits.
const void* prefill_instance(int head_dim, bool general, bool wide);

}  // namespace turboquant::cuda
