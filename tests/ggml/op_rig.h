// KV tensors on one device, and the graphs that llama.cpp builds over them (llama-kv-cache.cpp, build_attn_mha), run by ggml's scheduler
// over that device and the CPU. With "f16" the same graphs run on the CPU alone. And attention in double precision to compare with.
#pragma once

#include <functional>
#include <optional>

#include "ggml-alloc.h"
#include "tests/ggml/support.h"

namespace turboquant::conformance {

struct CacheShape {
    int k_dim = 128, v_dim = 128;
    int n_head_kv = 2;
    int n_cells = 256;  ///< per stream
    int n_streams = 1;
    bool v_in_k = false;  ///< a model without V (MLA): values are the first v_dim dims of the keys

    int n_embd_k() const { return k_dim * n_head_kv; }
    int n_embd_v() const { return v_in_k ? n_embd_k() : v_dim * n_head_kv; }
};

struct RopeOp {
    int n_dims, mode = 0;
    float base = 10000;
};

struct AttendOp {
    int n_head = 4;
    int n_tokens = 1;  ///< per stream
    int n_kv = 256;
    int first_stream = 0, n_streams = 1;
    std::vector<float> q;      ///< [stream][token][head][k_dim]
    std::vector<float> mask;   ///< [stream][token][n_kv], empty: none
    std::vector<float> sinks;  ///< [head], empty: none
    float scale = 1, max_bias = 0, softcap = 0;
};

/// Rows of normal random numbers.
std::vector<float> gaussian(size_t n, uint32_t seed, float sigma = 1);
/// x rounded to f16: what an f16 cache holds.
std::vector<float> as_f16(std::vector<float> x);

class OpRig {
  public:
    /// Throws std::runtime_error.
    OpRig(const std::string& device_name, const CacheShape& shape, const std::string& tag = "");

    /// SET_ROWS of k [n][n_embd_k] (through ROPE at `pos` if given) and v [n][n_embd_v] (not with v_in_k) into cells `rows` (stream *
    /// n_cells + cell). Returns the keys as written, after RoPE. Throws std::runtime_error if the graph fails.
    std::vector<float> write(std::span<const int64_t> rows, std::span<const float> k, std::span<const float> v,
                             std::optional<RopeOp> rope = {}, std::span<const int32_t> pos = {});
    /// FLASH_ATTN_EXT: [stream][token][head][v_dim]. Throws std::runtime_error if the graph fails.
    std::vector<float> attend(const AttendOp& op);
    /// Any operation with an f32 result, which `build` makes out of k(), v() and inputs of its own. Throws std::runtime_error if the graph
    /// gets no memory or fails.
    using Input = std::function<ggml_tensor*(ggml_type type, const void* data, int64_t n0, int64_t n1, int64_t n2)>;
    std::vector<float> compute(const std::function<ggml_tensor*(ggml_context* ctx, const Input& input)>& build);

    const CacheShape& shape() const { return shape_; }
    ggml_tensor* k() const { return k_; }
    ggml_tensor* v() const { return v_; }
    ggml_backend_buffer_t buffer() const { return buffer_.get(); }
    ggml_context* views() const { return views_.get(); }  ///< for the test's own views
    ggml_backend_t device_backend() const { return backends_.front().get(); }

  private:
    struct Graph;
    std::vector<float> run(Graph& g, ggml_tensor* out);

    CacheShape shape_;
    std::string device_name_;
    std::vector<Owned<ggml_backend>> backends_;  ///< the device's (if any), then the CPU's
    Owned<ggml_backend_sched> sched_;
    Owned<ggml_context> tensors_, views_;
    Owned<ggml_backend_buffer> buffer_;
    ggml_tensor *k_ = nullptr, *v_ = nullptr;
};

/// Attention in double precision over k [n_streams * n_cells][n_embd_k] and v [..][n_embd_v], ggml's definition of scale, cap, ALiBi and
/// sinks.
std::vector<float> reference_attention(const CacheShape& shape, const AttendOp& op, std::span<const float> k, std::span<const float> v);

/// |a - b| / |b|.
double relative_error(std::span<const float> a, std::span<const float> b);

}  // namespace turboquant::conformance
