// Reading a graph backwards from what is written into the cache: which operation made it, and the parameters of its RoPE. Also for those
// who only look on through llama.cpp's evaluation callback, so it needs nothing of the plugin's.
#pragma once

#include <cstring>

#include "turboquant/cache/rope.h"
#include "turboquant/ggml/host.h"

namespace turboquant::ggml {

inline constexpr int kRopeSplitPairs = 2, kRopeMultiAxis = 8, kRopeVision = 24;  ///< bits of ggml's RoPE mode

/// op_params are 32-bit words; some hold floats.
inline float float_param(const ggml_tensor* t, int i) {
    float f;
    std::memcpy(&f, &t->op_params[i], sizeof f);
    return f;
}

inline bool is_reshaping(const Ops& ops, const ggml_tensor* t) { return t->op == ops.view || t->op == ops.reshape || t->op == ops.permute; }

/// The operation whose result `t` shows.
inline const ggml_tensor* producer(const Ops& ops, const ggml_tensor* t) {
    while (is_reshaping(ops, t) && t->src[0]) t = t->src[0];
    return t;
}

/// Parameters of a ROPE op; freq_factors points into its src[2].
inline RopeParams rope_params(const ggml_tensor* rope) {
    RopeParams p;
    p.n_dims = rope->op_params[1];
    p.pairs = rope->op_params[2] & (kRopeSplitPairs | kRopeMultiAxis) ? RopePairs::split : RopePairs::adjacent;
    p.n_ctx_orig = rope->op_params[4];
    p.freq_base = float_param(rope, 5);
    p.freq_scale = float_param(rope, 6);
    p.ext_factor = float_param(rope, 7);
    p.attn_factor = float_param(rope, 8);
    p.beta_fast = float_param(rope, 9);
    p.beta_slow = float_param(rope, 10);
    p.n_offset = rope->op_params[15];
    p.freq_factors = rope->src[2] ? static_cast<const float*>(rope->src[2]->data) : nullptr;
    return p;
}

}  // namespace turboquant::ggml
