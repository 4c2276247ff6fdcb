// A model's keys and values as they are on their way into the cache, and the cache's shape, through llama.cpp's evaluation callback:
// whatever the architecture, what is written to a tensor named cache_k_l<N> by SET_ROWS is the keys of layer N.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "llama.h"
#include "turboquant/cache/rope.h"
#include "turboquant/llama/session.h"

namespace turboquant::llama {

/// One layer's cache. Zero heads: that side is not stored (a model without V).
struct KvLayerShape {
    int layer = 0;
    int k_head_dim = 0, k_heads = 0;
    int v_head_dim = 0, v_heads = 0;
    std::int64_t n_cells = 0;   ///< in the probe's context; fewer than its n_ctx in a sliding-window layer
    bool rope = false;          ///< keys come straight out of a ROPE operation
    RopeParams rope_params{};   ///< of that, without frequency factors
    float attention_scale = 1;  ///< of scores
    int window = 0;             ///< tokens that a query sees in a sliding-window layer; 0: all
};

/// query: with RoPE, as attention gets it. Of n_embd values, as one head: the residual stream before the layer, the same with the layer's attention
/// added, and what a norm behind attention lets through to it, each where the graph gives it a name.
enum class KvSource { key, key_before_rope, value, query, stream_before, stream, attention_normed };

/// Values of one layer for a batch of tokens: value(token, head, dim) at data + token*token_stride + head*head_stride + dim, in floats.
struct KvRows {
    int layer = 0;
    KvSource source = KvSource::key;
    int head_dim = 0, n_heads = 0, n_tokens = 0;
    const float* data = nullptr;
    std::size_t head_stride = 0, token_stride = 0;

    std::span<const float> row(int token, int head) const {
        return {data + static_cast<std::size_t>(token) * token_stride + static_cast<std::size_t>(head) * head_stride,
                static_cast<std::size_t>(head_dim)};
    }
};

class KvProbe {
  public:
    static constexpr int kBatch = 256;       ///< takes little memory
    static constexpr int kUsualBatch = 512;  ///< n_ubatch of llama.cpp's tools by default

    /// A context of llama.cpp's own f16 cache, where the model's weights are. Throws Error if it cannot be made or the model's cache is of a kind that is not understood.
    /// `n_batch`: a layer with a sliding window has cells for that and a batch. No memory of a user's context is to be told from the default.
    KvProbe(ModelFile& file, int n_ctx, int n_threads, int n_batch = kBatch);
    KvProbe(const KvProbe&) = delete;  // llama.cpp holds a pointer to this object
    KvProbe& operator=(const KvProbe&) = delete;

    /// Ascending by layer. Learned from a few tokens at construction.
    std::vector<KvLayerShape> layers() const;
    int n_ctx() const { return n_ctx_; }

    /// Decodes one sequence from an empty cache; calls sink for each layer, source and batch. key_before_rope only for layers with `rope`.
    /// `all_outputs`: logits are made of all tokens, so that the last layer, too, works on all of them. Throws Error.
    void run(std::span<const llama_token> tokens, const std::function<void(const KvRows&)>& sink, bool all_outputs = false);

  private:
    static bool see_node(ggml_tensor* t, bool ask, void* self);
    bool ask(ggml_tensor* t);
    void learn(const ggml_tensor* t);
    void emit(KvRows rows, const ggml_tensor* t);
    void decode(std::span<const llama_token> tokens, bool all_outputs = false);

    std::shared_ptr<llama_model> model_;
    int n_ctx_;
    std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
    std::map<int, KvLayerShape> shapes_;
    /// Operations whose results are read: a tensor's name alone is not unique ("Kcur-0" before and after RoPE). Value: layer of a ROPE over
    /// keys, else -1.
    std::map<std::pair<std::string, int>, int> wanted_;
    std::set<const ggml_tensor*> computed_;
    std::vector<float> copy_;  ///< of a tensor that is shown: it may be a GPU's
    const std::function<void(const KvRows&)>* sink_ = nullptr;
};

}  // namespace turboquant::llama
