// The operations of a KV cache, on our tensors. Each returns an empty string, or why it cannot be done and what to do about it.
#pragma once

#include <string>
#include <vector>

#include "turboquant/cache/window_attention.h"
#include "turboquant/ggml/buffer.h"
#include "turboquant/kernels/executor.h"

namespace turboquant::ggml {

/// What the ops need of the backend that runs them.
struct OpContext {
    const Device* device;
    const Kernels* kernels;
    Executor* executor;                   ///< runs the parts of an op
    std::vector<std::uint8_t> workspace;  ///< grown as needed, reused
    std::vector<std::int64_t> rows, cells;
    KeyBatch batch;
    std::vector<float> scaled_q;  ///< queries of one attention call, for keys with scaled channels
    std::vector<float> q_terms;   ///< score terms of the queries of one attention call
    std::vector<std::uint8_t> cell_terms;
    std::vector<std::int32_t> cell_pos;
    WindowAttention windows;
    std::vector<float> rounded;
};

/// Why an op on KV tensors can never be computed, whatever the cache holds; "" if it can.
std::string unservable(const Device& d, const ggml_tensor* op);

std::string compute_set_rows(OpContext& ctx, const ggml_tensor* op);
std::string compute_flash_attn(OpContext& ctx, const ggml_tensor* op);
std::string compute_rope_shift(OpContext& ctx, const ggml_tensor* op);

}  // namespace turboquant::ggml
