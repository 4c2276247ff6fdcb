// The operations of a KV cache, on our tensors. Each returns an empty string, or why it cannot be done and what to do about it.
#pragma once

#include <string>
#include <vector>

#include "turboquant/ggml/buffer.h"
#include "turboquant/kernels/executor.h"

namespace turboquant::ggml {

/// What the ops need of the backend that runs them.
struct OpContext {
    Device* device;
    CacheContext cache;
    std::vector<std::int64_t> rows;  ///< of one SET_ROWS, reused
    std::vector<StreamQuery> streams;
    std::vector<std::uint8_t> indices, mask;  ///< what the host must know of them, where they lie elsewhere
};

/// Why an op on KV tensors can never be computed, whatever the cache holds; "" if it can.
std::string unservable(const Device& d, const ggml_tensor* op);

/// Whether attention over KV tensors is over whole rows of one layer, from a sequence's first cell on: what compute_flash_attn does. Sparse
/// attention may take other parts of a cache; those are decoded.
bool attends_compressed(const ggml_tensor* op);

std::string compute_set_rows(OpContext& ctx, const ggml_tensor* op);
std::string compute_flash_attn(OpContext& ctx, const ggml_tensor* op);
std::string compute_rope_shift(OpContext& ctx, const ggml_tensor* op);

}  // namespace turboquant::ggml
