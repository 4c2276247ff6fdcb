#include "turboquant/llama/kv_probe.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "ggml.h"
#include "turboquant/ggml/graph_walk.h"
#include "turboquant/ggml/kv_names.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {
namespace {

/// By this program's own numbering: it runs with the ggml that it was compiled for.
constexpr ggml::Ops kOps{.none = GGML_OP_NONE,
                         .view = GGML_OP_VIEW,
                         .reshape = GGML_OP_RESHAPE,
                         .permute = GGML_OP_PERMUTE,
                         .transpose = GGML_OP_TRANSPOSE,
                         .set_rows = GGML_OP_SET_ROWS,
                         .flash_attn = GGML_OP_FLASH_ATTN_EXT,
                         .rope = GGML_OP_ROPE,
                         .custom = GGML_OP_CUSTOM};

const ggml_tensor* producer(const ggml_tensor* t) { return ggml::producer(kOps, t); }

/// Which tensor of the cache `t` is a view of, if any.
std::optional<ggml::KvName> cache_tensor(const ggml_tensor* t) { return ggml::parse_kv_name(t->view_src ? t->view_src->name : t->name); }

struct StreamTensor {
    int layer = 0;
    KvSource source = KvSource::stream;
};

/// Which part of the residual stream `t` is, by the names that llama.cpp's graphs give.
std::optional<StreamTensor> stream_tensor(const ggml_tensor* t) {
    constexpr std::pair<std::string_view, StreamTensor> kNames[] = {{"l_out-", {1, KvSource::stream_before}},
                                                                    {"ffn_inp-", {0, KvSource::stream}},
                                                                    {"sa_out-", {0, KvSource::stream}},
                                                                    {"attn_post_norm-", {0, KvSource::attention_normed}}};
    const std::string_view name = t->name;
    for (const auto& [prefix, at] : kNames) {
        if (!name.starts_with(prefix) || t->type != GGML_TYPE_F32) continue;
        int layer = -1;
        const auto [end, error] = std::from_chars(name.data() + prefix.size(), name.data() + name.size(), layer);
        if (error == std::errc() && end == name.data() + name.size()) return StreamTensor{layer + at.layer, at.source};
    }
    return std::nullopt;
}

}  // namespace

KvProbe::KvProbe(ModelFile& file, int n_ctx, int n_threads, int n_batch) : model_(file.model()), n_ctx_(n_ctx) {
    llama_model* const model = model_.get();
    file.set_caches({});
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(n_ctx);
    params.n_batch = params.n_ubatch = static_cast<std::uint32_t>(std::min(n_ctx, n_batch));
    params.n_threads = params.n_threads_batch = n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // without it the values are cached transposed
    params.swa_full = false;
    params.no_perf = true;
    params.cb_eval = see_node;
    params.cb_eval_user_data = this;
    take_log_problems();
    context_.reset(llama_init_from_model(model, params));
    if (!context_)
        throw Error(fmt::format("llama.cpp could not make a context of {} tokens; try a smaller -c{}", n_ctx, take_log_problems()));
    n_ctx_ = static_cast<int>(llama_n_ctx(context_.get()));
    const llama_vocab* vocab = llama_model_get_vocab(model);
    const llama_token token = llama_vocab_bos(vocab) != LLAMA_TOKEN_NULL ? llama_vocab_bos(vocab) : 0;
    decode(std::vector<llama_token>(4, token));
    if (shapes_.empty()) throw Error("this model writes no keys or values into a cache that could be looked at");
}

std::vector<KvLayerShape> KvProbe::layers() const {
    std::vector<KvLayerShape> out;
    for (const auto& [layer, shape] : shapes_) out.push_back(shape);
    return out;
}

void KvProbe::run(std::span<const llama_token> tokens, const std::function<void(const KvRows&)>& sink, bool all_outputs) {
    sink_ = &sink;
    decode(tokens, all_outputs);
    sink_ = nullptr;
}

void KvProbe::decode(std::span<const llama_token> tokens, bool all_outputs) {
    llama_memory_clear(llama_get_memory(context_.get()), true);
    const std::unique_ptr<llama_batch, void (*)(llama_batch*)> owner(new llama_batch(llama_batch_init(kBatch, 0, 1)), [](llama_batch* b) {
        llama_batch_free(*b);
        delete b;
    });
    llama_batch& batch = *owner;
    for (std::size_t at = 0; at < tokens.size(); at += kBatch) {
        const auto part = tokens.subspan(at, std::min<std::size_t>(kBatch, tokens.size() - at));
        batch.n_tokens = static_cast<std::int32_t>(part.size());
        for (std::size_t i = 0; i < part.size(); i++) {
            batch.token[i] = part[i], batch.pos[i] = static_cast<llama_pos>(at + i);
            batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0;
            batch.logits[i] = all_outputs || i + 1 == part.size();
        }
        take_log_problems();
        if (const int rc = llama_decode(context_.get(), batch); rc != 0)
            throw Error(fmt::format("llama.cpp failed to decode (code {}); run again with --verbose{}", rc, take_log_problems()));
    }
}

bool KvProbe::see_node(ggml_tensor* t, bool ask, void* self) {
    auto& probe = *static_cast<KvProbe*>(self);
    std::optional<StreamTensor> stream = probe.sink_ ? stream_tensor(t) : std::nullopt;
    if (stream && !probe.shapes_.contains(stream->layer)) stream.reset();  // behind the last layer, or a layer that caches nothing
    if (ask) return probe.ask(t) || stream;
    if (stream)
        probe.emit({stream->layer, stream->source, static_cast<int>(t->ne[0]), 1, static_cast<int>(t->ne[1]), nullptr, 0,
                    t->nb[1] / sizeof(float)},
                   t);
    else
        probe.computed_.insert(t);
    return true;
}

// The scheduler computes up to a node for which the answer is true before it asks about the next. So when it asks about a reader of a
// wanted tensor, that tensor is there and nothing has overwritten it yet.
bool KvProbe::ask(ggml_tensor* t) {
    if (!sink_) {
        learn(t);
        return false;
    }
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {
        const ggml_tensor* q = t->src[0];  // [head_dim, n_tokens, n_heads]
        const auto cache = cache_tensor(t->src[1]);
        if (cache && computed_.erase(producer(q)))
            emit({cache->layer, KvSource::query, static_cast<int>(q->ne[0]), static_cast<int>(q->ne[2]), static_cast<int>(q->ne[1]),
                  nullptr, q->nb[2] / sizeof(float), q->nb[1] / sizeof(float)},
                 q);
        return false;
    }
    if (const auto cache = cache_tensor(t); cache && t->op == GGML_OP_SET_ROWS) {
        const ggml_tensor* rows = t->src[0];  // [n_embd, n_tokens]
        const KvLayerShape& s = shapes_.at(cache->layer);
        const bool key = cache->side == Side::key;
        const int head_dim = key ? s.k_head_dim : s.v_head_dim, heads = key ? s.k_heads : s.v_heads;
        if (computed_.erase(producer(rows)))
            emit({cache->layer, key ? KvSource::key : KvSource::value, head_dim, heads, static_cast<int>(rows->ne[1]), nullptr,
                  static_cast<std::size_t>(head_dim), rows->nb[1] / sizeof(float)},
                 rows);
        return false;
    }
    const auto want = wanted_.find({t->name, t->op});
    if (want == wanted_.end()) return false;
    const ggml_tensor* heads = want->second >= 0 ? t->src[0] : nullptr;  // [head_dim, n_heads, n_tokens]
    if (heads && computed_.erase(producer(heads)))
        emit({want->second, KvSource::key_before_rope, static_cast<int>(heads->ne[0]), static_cast<int>(heads->ne[1]),
              static_cast<int>(heads->ne[2]), nullptr, heads->nb[1] / sizeof(float), heads->nb[2] / sizeof(float)},
             heads);
    return true;
}

void KvProbe::learn(const ggml_tensor* t) {
    if (t->op == GGML_OP_FLASH_ATTN_EXT) {  // its operands show the cache head by head
        const auto k = cache_tensor(t->src[1]), v = cache_tensor(t->src[2]);
        if (!k || !v) return;
        KvLayerShape& s = shapes_[k->layer];
        s.layer = k->layer;
        wanted_.try_emplace({producer(t->src[0])->name, producer(t->src[0])->op}, -1);
        s.attention_scale = ggml::float_param(t, 0);
        s.k_head_dim = static_cast<int>(t->src[1]->ne[0]), s.k_heads = static_cast<int>(t->src[1]->ne[2]);
        if (v->side == Side::value) s.v_head_dim = static_cast<int>(t->src[2]->ne[0]), s.v_heads = static_cast<int>(t->src[2]->ne[2]);
    }
    const auto cache = cache_tensor(t);
    if (!cache || t->op != GGML_OP_SET_ROWS) return;
    KvLayerShape& s = shapes_[cache->layer];
    s.n_cells = t->view_src->ne[1];
    s.window = s.n_cells < n_ctx_ ? llama_model_n_swa(model_.get()) : 0;
    const ggml_tensor* made = producer(t->src[0]);
    const bool key = cache->side == Side::key, rope = key && made->op == GGML_OP_ROPE;
    if (key) s.rope = rope;
    if (rope) s.rope_params = ggml::rope_params(made), s.rope_params.freq_factors = nullptr;  // which outlive no graph
    wanted_[{made->name, made->op}] = rope ? cache->layer : -1;
    if (rope) wanted_.try_emplace({producer(made->src[0])->name, producer(made->src[0])->op}, -1);
}

void KvProbe::emit(KvRows rows, const ggml_tensor* t) {
    if (t->type != GGML_TYPE_F32 || t->nb[0] != sizeof(float)) return;
    copy_.resize((ggml_nbytes(t) + sizeof(float) - 1) / sizeof(float));
    ggml_backend_tensor_get(t, copy_.data(), 0, ggml_nbytes(t));
    rows.data = copy_.data();
    (*sink_)(rows);
}

}  // namespace turboquant::llama
