#include "turboquant/ggml/bind.h"

#include <stdexcept>

namespace turboquant::ggml {
namespace {

/// Rows are [head_dim, n_head, n_tokens] seen as [n_embd, n_tokens]. The tensor of that shape tells the head size: the nearest to the rows
/// whose first dimension is less than a row, or else the nearest (one head). What it is a part of, such as a fused projection, has more
/// values and tells nothing. 0: there is no such tensor.
std::int64_t head_dim_of_rows(const Ops& ops, const ggml_tensor* rows) {
    std::int64_t found = 0;
    for (const ggml_tensor* t = rows; is_reshaping(ops, t) && t->src[0];) {
        t = t->src[0];
        if (ggml_nelements(t) != ggml_nelements(rows)) break;
        if (t->ne[0] * t->ne[1] != rows->ne[0] || t->ne[2] != rows->ne[1]) continue;
        if (t->ne[0] < rows->ne[0]) return t->ne[0];
        if (!found) found = t->ne[0];
    }
    return found;
}

/// The ROPE op that made these keys, or null: no RoPE, or hidden behind another op.
const ggml_tensor* rope_of_rows(const Ops& ops, const ggml_tensor* rows) {
    const ggml_tensor* t = producer(ops, rows);
    const bool usable = t->op == ops.rope && t->src[1] && t->src[1]->type == GGML_TYPE_I32 && t->src[1]->ne[0] >= rows->ne[1] &&
                        (t->op_params[2] & kRopeVision) != kRopeVision;
    return usable ? t : nullptr;
}

void bind_head(const Device& d, const ggml_tensor* t, std::int64_t head_dim) {
    KvExtra* e = t ? kv_extra(t) : nullptr;
    if (!e) return;
    auto& buffer = *static_cast<KvBuffer*>(root(t)->buffer->context);
    buffer.decide_formats(static_cast<int>(head_dim));
    if (!e->refused.empty() || (e->bound() && e->kv().head_dim() == head_dim)) return;
    try {
        const auto lock = buffer.changing();
        // Rows were shown in another shape than attention reads: that is the one that counts.
        if (e->bound() && !e->written) e->layer->set_tensor(KvGeometry(e->kv().geometry()), d.inner().store_in(e->memory));
        const KvSpec& spec = buffer.spec();
        const auto scales = spec.k_scales.find(kv_layer(root(t)->name));
        LayerCache::KeyTreatment keys{spec.offset, {}};
        if (scales != spec.k_scales.end()) keys.scales = scales->second;
        e->layer->bind(e->side, static_cast<int>(head_dim), keys);
    } catch (const std::exception& error) {
        e->refused = error.what() + std::string(d.plan ? kPlanRemedy : "");
    }
    buffer.announce();
}

void bind_rope(const Device& d, const ggml_tensor* set_rows) {
    KvExtra* e = kv_extra(set_rows);
    if (!e || !e->refused.empty() || e->side != Side::key || e->layer->rope_known()) return;
    const ggml_tensor* rope = rope_of_rows(d.ops, set_rows->src[0]);
    if (rope && rope->src[2] && !rope->src[2]->data) return;  // a measuring run: the factors come later
    try {
        std::optional<RopeParams> params = rope ? std::optional(rope_params(rope)) : std::nullopt;
        std::vector<std::uint8_t> factors;
        if (rope && rope->src[2]) params->freq_factors = static_cast<const float*>(on_host(rope->src[2], factors));
        e->layer->set_rope(params);
    } catch (const std::invalid_argument& error) {
        e->refused = error.what() + std::string(d.plan ? kPlanRemedy : "");
    }
}

}  // namespace

void bind_from_op(const Device& d, const ggml_tensor* op, bool computing) {
    if (op->op == d.ops.flash_attn) {
        bind_head(d, op->src[1], op->src[1]->ne[0]);
        // A model without V reads its values out of the keys (MLA): then the head size is that of the keys.
        if (root(op->src[2]) != root(op->src[1])) bind_head(d, op->src[2], op->src[2]->ne[0]);
    } else if (const KvExtra* e = op->op == d.ops.set_rows ? kv_extra(op) : nullptr; e && op->ne[0] == root(op)->ne[0]) {
        const std::int64_t rows = head_dim_of_rows(d.ops, op->src[0]), head_dim = rows ? rows : op->ne[0];
        if (!e->bound() && (computing || head_dim_supported(static_cast<int>(head_dim)))) bind_head(d, op, head_dim);
        if (e->bound()) bind_rope(d, op);
    }
}

RowPositions positions_of_rows(const Device& d, const ggml_tensor* set_rows) {
    // With M-RoPE the first n_tokens entries are the temporal positions: all that text has. The tokens of an image share one, its first
    // token stands where text would.
    const ggml_tensor* rope = rope_of_rows(d.ops, set_rows->src[0]);
    std::vector<std::uint8_t> memory;
    const auto* pos = rope ? static_cast<const std::int32_t*>(on_host(rope->src[1], memory)) : nullptr;
    if (!pos) return {};
    const std::int64_t n = set_rows->src[0]->ne[1];
    RowPositions rows{{pos, static_cast<std::size_t>(n)}, std::move(memory)};
    if (!(rope->op_params[2] & kRopeMultiAxis) || rope->src[1]->ne[0] < 3 * n) return rows;
    for (std::int64_t i = 0; i < n; i++) rows.beside.push_back(pos[n + i] != pos[i] || pos[2 * n + i] != pos[i]);
    return rows;
}

}  // namespace turboquant::ggml
