#include "turboquant/ggml/ops.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "turboquant/ggml/bind.h"

namespace turboquant::ggml {
namespace {

constexpr const char* kNeedsFlashAttention =
    "flash attention is off for this context (its cache is then laid out in a way that cannot be compressed): run with -fa on "
    "(flash_attn=True in Python), or without a turboquant device, as models must for which llama.cpp turns it off itself (Grok)";

const float* floats(const ggml_tensor* t) { return static_cast<const float*>(t->data); }

std::string name_of(const ggml_tensor* t) { return std::string("'") + root(t)->name + "'"; }
/// "'cache_k_l0': why ops on it fail".
std::string problem_of(const ggml_tensor* t) {
    const KvExtra* e = kv_extra(t);
    return name_of(t) + ": " + (!e ? "it is no tensor of this device" : e->refused.empty() ? "nothing was written to it" : e->refused);
}
std::string not_finite(const ggml_tensor* t) {
    return "keys or values for " + name_of(t) + " are not finite (NaN or infinity in the model's activations)";
}

KvBuffer& buffer_of(const ggml_tensor* t) { return *static_cast<KvBuffer*>(root(t)->buffer->context); }
void report_lost(const ggml_tensor* t) { buffer_of(t).report_lost(t, kv_extra(t)->layer->take_lost()); }

}  // namespace

std::string unservable(const Device& d, const ggml_tensor* op) {
    if (is_view_op(d.ops, op)) return {};
    const auto refused = [](const ggml_tensor* t) {
        const KvExtra* e = t ? kv_extra(t) : nullptr;
        return e && !e->refused.empty();
    };
    if (refused(op)) return problem_of(op);
    if (const auto src = std::ranges::find_if(op->src, refused); src != std::end(op->src)) return problem_of(*src);
    const KvExtra* written = kv_extra(op);
    if (op->op == d.ops.set_rows && written)
        return op->ne[0] == written->kv().geometry().n_embd ? std::string() : std::string(kNeedsFlashAttention);
    if (!d.on_host() && op->op == d.ops.flash_attn && kv_extra(op->src[1]) && root(op->src[1]) == root(op->src[2]))
        return "models that read their values out of the keys (MLA) have no kernels on " + d.gpu->name() + ": take the device " + d.word +
               "-cpu";
    if (!d.on_host() && op->op == d.ops.flash_attn && kv_extra(op->src[1]) && kv_extra(op->src[2]) &&
        op->src[1]->ne[0] != op->src[2]->ne[0])
        return "keys with heads of " + std::to_string(op->src[1]->ne[0]) + " values and values with heads of " +
               std::to_string(op->src[2]->ne[0]) + " have no kernels on " + d.gpu->name() + ": take the device " + d.word + "-cpu";
    if (!written || op->op == d.ops.rope) return {};  // what only reads gets decoded rows
    return std::string("this model writes its KV cache with ") + ggml_op_desc(op) +
           ", which a compressed cache cannot do; run it without a turboquant device";
}

std::string compute_set_rows(OpContext& ctx, const ggml_tensor* op) {
    KvExtra* e = kv_extra(op);
    const ggml_tensor *x = op->src[0], *idx = op->src[1];
    if (!e || !e->refused.empty()) return "cannot write " + problem_of(op);
    const KvGeometry& g = e->kv().geometry();
    if (op->ne[0] != g.n_embd) return std::string(kNeedsFlashAttention);
    if (x->type != GGML_TYPE_F32 || x->ne[2] * x->ne[3] != 1) return "rows for " + name_of(op) + " are not a plain f32 matrix";
    bind_from_op(*ctx.device, op, true);
    if (!e->refused.empty()) return "cannot write " + problem_of(op);

    e->written = true;
    const std::int64_t n = x->ne[1];
    const std::int64_t n_rows = g.n_cells * g.n_streams;
    ctx.rows.resize(n);
    const void* indices = on_host(idx, ctx.indices);
    for (std::int64_t i = 0; i < n; i++) {
        const char* at = static_cast<const char*>(indices) + i * idx->nb[0];
        ctx.rows[i] = idx->type == GGML_TYPE_I64 ? *reinterpret_cast<const std::int64_t*>(at) : *reinterpret_cast<const std::int32_t*>(at);
        if (ctx.rows[i] < 0 || ctx.rows[i] >= n_rows) return "row " + std::to_string(ctx.rows[i]) + " is outside of " + name_of(op);
    }
    const StoreRows batch{floats(x), x->nb[1] / sizeof(float), ctx.rows, {}, {}};
    bool finite;
    if (e->side == Side::key) {
        const RowPositions at = positions_of_rows(*ctx.device, op);
        finite = e->layer->write_keys(ctx.cache, batch, at.pos, at.beside);
        report_lost(op);
        buffer_of(op).begin_batch();
    } else {
        finite = e->layer->write_values(ctx.cache, batch);
    }
    return finite ? std::string() : not_finite(op);
}

bool attends_compressed(const ggml_tensor* op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    const KvExtra *ke = kv_extra(k), *ve = kv_extra(v);
    if (!ke || !ve || ke->layer != ve->layer) return false;
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2))) return false;
    if (!ke->bound() || !ve->bound()) return true;  // there is a reason for that: compute_flash_attn gives it
    const auto row_bytes = static_cast<std::size_t>(root(k)->nb[1]);
    const std::int64_t n_cells = ke->kv().geometry().n_cells, first_row = static_cast<std::int64_t>(k->view_offs / row_bytes);
    const bool v_is_k = root(k) == root(v);
    return k->view_offs % row_bytes == 0 && first_row % n_cells == 0 &&
           v->view_offs == (v_is_k ? k->view_offs : static_cast<std::size_t>(root(v)->nb[2] * (first_row / n_cells))) &&
           k->ne[0] == ke->kv().head_dim() && k->ne[2] == ke->kv().n_head() && k->nb[1] == row_bytes &&
           (v_is_k || (v->ne[0] == ve->kv().head_dim() && v->ne[2] == ve->kv().n_head() && v->nb[1] == root(v)->nb[1])) &&
           n_cells == ve->kv().geometry().n_cells && k->ne[1] <= n_cells && v->ne[1] == k->ne[1];
}

std::string compute_flash_attn(OpContext& ctx, const ggml_tensor* op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    const KvExtra* ke = kv_extra(k);
    for (const ggml_tensor* t : {k, v})
        if (const KvExtra* e = kv_extra(t); !e || !e->refused.empty() || !e->bound()) return "cannot attend over " + problem_of(t);

    AttentionArgs a;
    a.n_head = static_cast<int>(q->ne[2]);
    a.n_head_kv = static_cast<int>(k->ne[2]);
    a.n_tokens = static_cast<int>(q->ne[1]);
    a.n_kv = static_cast<int>(k->ne[1]);
    a.q_token_stride = q->nb[1] / sizeof(float);
    a.q_head_stride = q->nb[2] / sizeof(float);
    a.out_head_stride = op->nb[1] / sizeof(float);
    a.out_token_stride = op->nb[2] / sizeof(float);
    a.v_is_k = root(k) == root(v);
    a.v_dim_out = static_cast<int>(v->ne[0]);
    a.scale = float_param(op, 0);
    a.max_bias = float_param(op, 1);
    a.logit_softcap = float_param(op, 2);
    // ggml folds the cap into the scale before applying it: cap * tanh(scale/cap * qk), the same as ours.
    if (mask) {
        a.mask_token_stride = mask->nb[1] / 2;
        a.mask_head_stride = mask->nb[2] / 2;
        a.mask_heads = static_cast<int>(mask->ne[2]);
    }
    a.sinks = sinks ? floats(sinks) : nullptr;

    const std::int64_t row_bytes = root(k)->nb[1], n_cells = ke->kv().geometry().n_cells;
    const std::int64_t first_row = static_cast<std::int64_t>(k->view_offs) / row_bytes;

    ctx.streams.clear();
    const void* host_mask = mask && !ctx.device->on_host() && !is_there(mask) ? on_host(mask, ctx.mask) : nullptr;
    for (std::int64_t s = 0; s < q->ne[3]; s++)
        ctx.streams.push_back(
            {reinterpret_cast<const float*>(static_cast<const char*>(q->data) + s * q->nb[3]),
             reinterpret_cast<float*>(static_cast<char*>(op->data) + s * op->nb[3]),
             mask ? reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(mask->data) + s % mask->ne[3] * mask->nb[3]) : nullptr,
             host_mask ? reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(host_mask) + s % mask->ne[3] * mask->nb[3])
                       : nullptr,
             mask});
    const char* error = ke->layer->attend(ctx.cache, a, first_row / n_cells, ctx.streams);
    report_lost(k);
    return error ? "attention over " + name_of(k) + ": " + error : std::string();
}

std::string compute_rope_shift(OpContext& ctx, const ggml_tensor* op) {
    KvExtra* e = kv_extra(op->src[0]);
    const ggml_tensor *x = op->src[0], *shift = op->src[1];
    if (!e || !e->refused.empty() || !e->bound()) return "cannot shift " + problem_of(x);
    if (op->view_src != x->view_src || e->side != Side::key)
        return "RoPE on " + name_of(op) + " is only supported in place (context shift)";
    if (op->op_params[2] & kRopeMultiAxis) return "context shift with M-RoPE positions is not supported; run without --context-shift";
    RopeParams p = without_magnitude(rope_params(op));
    p.n_offset += static_cast<int>(x->view_offs / sizeof(std::uint16_t));
    const std::int64_t n_rows = e->kv().geometry().n_cells * e->kv().geometry().n_streams;
    if (x->ne[2] != n_rows || shift->ne[0] < n_rows || p.n_offset + p.n_dims > e->kv().head_dim())
        return "context shift of a part of " + name_of(op) + " is not supported; run without --context-shift";

    std::vector<std::uint8_t> factors;
    if (op->src[2]) p.freq_factors = static_cast<const float*>(on_host(op->src[2], factors));
    const void* shifts = on_host(shift, ctx.indices);
    e->layer->shift(ctx.cache.store, p, {static_cast<const std::int32_t*>(shifts), static_cast<std::size_t>(n_rows)});
    return {};
}

}  // namespace turboquant::ggml
