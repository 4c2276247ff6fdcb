#include "turboquant/ggml/ops.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "turboquant/ggml/bind.h"

namespace turboquant::ggml {
namespace {

constexpr const char* kNeedsFlashAttention =
    "flash attention is off for this model or context (its cache is then laid out in a way that cannot be compressed): run with -fa on, or "
    "without a "
    "turboquant device";

const float* floats(const ggml_tensor* t) { return static_cast<const float*>(t->data); }

std::string name_of(const ggml_tensor* t) { return std::string("'") + root(t)->name + "'"; }
/// "'cache_k_l0': why ops on it fail".
std::string problem_of(const ggml_tensor* t) {
    const KvExtra* e = kv_extra(t);
    return name_of(t) + ": " + (!e ? "it is no tensor of this device" : e->problem().empty() ? "nothing was written to it" : e->problem());
}
std::string not_finite(const ggml_tensor* t) {
    return "keys or values for " + name_of(t) + " are not finite (NaN or infinity in the model's activations)";
}

/// Offset ids of the cells that some query token sees, in ctx.cell_terms as indices into the returned list. Cells of ended sequences keep
/// their ids until they are overwritten, so only the mask tells. ctx.cell_pos gets the positions.
std::vector<int> visible_offsets(OpContext& ctx, const CellPositions& cells, std::int64_t stream, const AttentionArgs& a) {
    const std::int64_t first = stream * cells.n_cells();
    constexpr std::uint16_t kHidden = 0xfc00;
    std::vector<std::uint8_t> visible(a.n_kv, !a.mask);
    for (int t = 0; a.mask && t < a.n_tokens; t++) {
        const std::uint16_t* mask = a.mask + t * a.mask_token_stride;
        for (int j = 0; j < a.n_kv; j++) visible[j] |= mask[j] != kHidden;
    }
    std::vector<int> list;
    int index[CellPositions::kMaxOffsets];
    std::fill(std::begin(index), std::end(index), -1);
    ctx.cell_terms.assign(a.n_kv, 0);
    ctx.cell_pos.resize(a.n_kv);
    for (int j = 0; j < a.n_kv; j++) {
        ctx.cell_pos[j] = cells.at(first + j);
        if (!visible[j] || ctx.cell_pos[j] < 0) continue;
        const int id = cells.offset_id(first + j);
        int& i = index[id];
        if (i < 0) i = static_cast<int>(list.size()), list.push_back(id);
        ctx.cell_terms[j] = static_cast<std::uint8_t>(i);
    }
    // Hidden cells go on from their neighbours: successive positions and one term per tile are the fast case, and what a hidden cell held
    // before must not choose between two ways to round.
    for (int j = 0; j < a.n_kv; j++)
        if (!visible[j]) {
            ctx.cell_terms[j] = j ? ctx.cell_terms[j - 1] : 0;
            ctx.cell_pos[j] = j && ctx.cell_pos[j - 1] >= 0 ? ctx.cell_pos[j - 1] + 1 : -1;
        }
    return list;
}

/// Score terms that give back what offset removal took from the keys: q.R(p)mu. False if an offset is not known: of a restored state only a
/// part arrived.
bool set_score_term(OpContext& ctx, KvExtra& e, std::int64_t stream, AttentionArgs& a) {
    KeyOffset& offset = *e.kv.offset();
    const std::vector<int> ids = visible_offsets(ctx, *e.positions, stream, a);
    if (ids.empty()) return true;
    const std::size_t row = 2 * offset.n_freq(), d = e.kv.head_dim();
    ctx.q_terms.resize(ids.size() * a.n_tokens * a.n_head * row);
    float* terms = ctx.q_terms.data();
    for (const int id : ids) {
        offset.begin(id, e.positions->generation(id));
        if (offset.expected(id)) return false;
        for (int t = 0; t < a.n_tokens; t++)
            for (int h = 0; h < a.n_head; h++, terms += row)
                offset.query_terms(id, {a.q + t * a.q_token_stride + h * a.q_head_stride, d}, h / (a.n_head / a.n_head_kv), {terms, row});
    }
    a.term = {offset.n_freq(),     ctx.q_terms.data(),           offset.turns(),
              ctx.cell_pos.data(), static_cast<int>(ids.size()), ctx.cell_terms.data()};
    return true;
}

/// Splits a call over the threads.
void run_call(OpContext& ctx, const AttentionArgs& a) {
    const std::int64_t work = static_cast<std::int64_t>(a.n_tokens) * a.n_head * a.n_kv;
    const AttentionPlan plan = plan_attention(*ctx.kernels, a, work < 4096 ? 1 : ctx.executor->n_threads());
    if (ctx.workspace.size() < plan.workspace_bytes + 64) ctx.workspace.resize(plan.workspace_bytes + 64);
    auto* ws = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(ctx.workspace.data()) + 63) / 64 * 64);
    ctx.executor->run(plan.n_threads, [&](int ith) { run_attention(*ctx.kernels, plan, a, ws, ith); });
    if (plan.n_chunks > 1) ctx.executor->run(plan.n_threads, [&](int ith) { merge_attention(*ctx.kernels, plan, a, ws, ith); });
}

/// Queries for keys with scaled channels, in ctx.scaled_q.
void scale_queries(OpContext& ctx, const KeyOffset& offset, AttentionArgs& a) {
    const std::size_t d = a.k.shape.head_dim;
    ctx.scaled_q.resize(static_cast<std::size_t>(a.n_tokens) * a.n_head * d);
    float* out = ctx.scaled_q.data();
    for (int t = 0; t < a.n_tokens; t++)
        for (int h = 0; h < a.n_head; h++, out += d)
            offset.scale_query({a.q + t * a.q_token_stride + h * a.q_head_stride, d}, h / (a.n_head / a.n_head_kv), {out, d});
    a.q = ctx.scaled_q.data(), a.q_head_stride = d, a.q_token_stride = a.n_head * d;
}

/// `plain` has the queries as the model made them.
void run_windowed(OpContext& ctx, const AttentionArgs& a, const AttentionArgs& plain, KvExtra& ke, KvExtra& ve, std::int64_t stream) {
    ExactRows *k = ke.kv.exact(), *v = a.v_is_k ? nullptr : ve.kv.exact();
    if (!ctx.windows.split(a, *k, v, *ke.positions, stream)) return run_call(ctx, a);
    ctx.windows.set_exact_queries(plain.q, plain.q_token_stride, plain.q_head_stride);
    run_call(ctx, ctx.windows.compressed());
    run_call(ctx, ctx.windows.exact());
    const int parts = a.n_tokens < 16 ? 1 : ctx.executor->n_threads();
    ctx.executor->run(parts, [&](int ith) { ctx.windows.merge(ith, parts); });
}

/// Encodes rows of keys or values; false if a value is not finite.
bool encode_rows(OpContext& ctx, KvExtra& e, const float* x, std::size_t stride) {
    KvTensor& kv = e.kv;
    const bool offset = kv.geometry().side == Side::key && removes_offset(e);
    if (!offset && kv.measuring()) return kv.encode_rows(*ctx.kernels, x, stride, ctx.rows);
    // Split over heads: tiles of different heads are disjoint.
    const auto n = static_cast<std::int64_t>(ctx.rows.size());
    const int n_head = kv.n_head(), head_dim = kv.head_dim();
    const int parts = n * n_head < 64 ? 1 : std::min(ctx.executor->n_threads(), n_head);
    ctx.cells.resize(n * parts);
    std::atomic<bool> finite = true;
    if (offset) kv.begin_keys(x, stride, ctx.rows, *e.positions, ctx.batch);
    ctx.executor->run(parts, [&](int ith) {
        const std::span<std::int64_t> scratch(ctx.cells.data() + n * ith, n);
        if (offset && !kv.encode_part(*ctx.kernels, ith, parts, x, stride, ctx.rows, *e.positions, scratch)) finite = false;
        for (int h = ith; h < n_head && !offset; h += parts)
            if (!kv.encode(*ctx.kernels, h, x + h * head_dim, stride, ctx.rows, scratch)) finite = false;
    });
    if (offset && !kv.end_keys(*ctx.kernels, ctx.rows, *e.positions, ctx.batch)) finite = false;
    return finite;
}

}  // namespace

std::string unservable(const Device& d, const ggml_tensor* op) {
    if (is_view_op(d.ops, op)) return {};
    for (const ggml_tensor* t : {op, static_cast<const ggml_tensor*>(op->src[0]), static_cast<const ggml_tensor*>(op->src[1]),
                                 static_cast<const ggml_tensor*>(op->src[2])})
        if (const KvExtra* e = t ? kv_extra(t) : nullptr; e && !e->refused.empty()) return problem_of(t);
    const KvExtra* written = kv_extra(op);
    if (op->op == d.ops.set_rows && written)
        return op->ne[0] == written->kv.geometry().n_embd ? std::string() : std::string(kNeedsFlashAttention);
    if (op->op == d.ops.flash_attn || (op->op == d.ops.rope && written)) return {};
    for (const ggml_tensor* src : op->src)
        if (src && kv_extra(src))
            return std::string("this model reads its KV cache with ") + ggml_op_desc(op) +
                   ", which a compressed cache cannot serve. If flash attention is off, run with -fa on; else run this model without a "
                   "turboquant device";
    return {};
}

std::string compute_set_rows(OpContext& ctx, const ggml_tensor* op) {
    KvExtra* e = kv_extra(op);
    const ggml_tensor *x = op->src[0], *idx = op->src[1];
    if (!e || !e->problem().empty()) return "cannot write " + problem_of(op);
    const KvTensor::Geometry& g = e->kv.geometry();
    if (op->ne[0] != g.n_embd) return std::string(kNeedsFlashAttention);
    if (x->type != GGML_TYPE_F32 || x->ne[2] * x->ne[3] != 1) return "rows for " + name_of(op) + " are not a plain f32 matrix";
    bind_from_op(*ctx.device, op);
    if (!e->problem().empty()) return "cannot write " + problem_of(op);

    const std::int64_t n = x->ne[1];
    const std::int64_t n_rows = g.n_cells * g.n_streams;
    ctx.rows.resize(n);
    for (std::int64_t i = 0; i < n; i++) {
        const char* at = static_cast<const char*>(idx->data) + i * idx->nb[0];
        ctx.rows[i] = idx->type == GGML_TYPE_I64 ? *reinterpret_cast<const std::int64_t*>(at) : *reinterpret_cast<const std::int32_t*>(at);
        if (ctx.rows[i] < 0 || ctx.rows[i] >= n_rows) return "row " + std::to_string(ctx.rows[i]) + " is outside of " + name_of(op);
    }
    e->kv.finish_restore(*ctx.kernels, *e->positions);
    if (g.side == Side::key) set_positions(*ctx.device, *e, op, ctx.rows);
    const float* values = floats(x);
    std::size_t stride = x->nb[1] / sizeof(float);
    if (e->kv.exact()) {
        e->kv.exact()->round(values, stride, ctx.rows, *e->positions, ctx.rounded);
        values = ctx.rounded.data(), stride = g.n_embd;
    }
    if (!encode_rows(ctx, *e, values, stride)) return not_finite(op);
    if (e->kv.exact()) e->kv.exact()->add(*ctx.kernels, values, ctx.rows, *e->positions);
    return {};
}

std::string compute_flash_attn(OpContext& ctx, const ggml_tensor* op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    KvExtra *ke = kv_extra(k), *ve = kv_extra(v);
    for (const ggml_tensor* t : {k, v})
        if (const KvExtra* e = kv_extra(t); !e || !e->problem().empty() || !e->kv.bound()) return "cannot attend over " + problem_of(t);
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2)))
        return "unexpected layout of the query or the mask in attention over " + name_of(k);

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

    const std::int64_t row_bytes = root(k)->nb[1], n_cells = ke->kv.geometry().n_cells;
    const std::int64_t first_row = static_cast<std::int64_t>(k->view_offs) / row_bytes;
    if (k->view_offs % row_bytes || first_row % n_cells || (!a.v_is_k && v->view_offs != root(v)->nb[2] * (first_row / n_cells)) ||
        (a.v_is_k && v->view_offs != k->view_offs) || k->ne[0] != ke->kv.head_dim() || a.n_head_kv != ke->kv.n_head())
        return "attention over a part of " + name_of(k) +
               " that does not begin with a sequence's first cell is not supported; please report the model";
    if (ke->kv.geometry().n_cells != ve->kv.geometry().n_cells || a.n_kv > n_cells)
        return "sizes of " + name_of(k) + " and " + name_of(v) + " differ";

    ke->kv.finish_restore(*ctx.kernels, *ke->positions);
    const AttentionArgs common = a;
    for (std::int64_t s = 0; s < q->ne[3]; s++) {
        a = common;
        a.q = reinterpret_cast<const float*>(static_cast<const char*>(q->data) + s * q->nb[3]);
        a.out = reinterpret_cast<float*>(static_cast<char*>(op->data) + s * op->nb[3]);
        if (mask) a.mask = reinterpret_cast<const std::uint16_t*>(static_cast<const char*>(mask->data) + s % mask->ne[3] * mask->nb[3]);
        a.k = ke->kv.view(first_row / n_cells + s);
        a.v = ve->kv.view(first_row / n_cells + s);
        const AttentionArgs plain = a;
        if (removes_offset(*ke) && ke->kv.offset()->scaled()) scale_queries(ctx, *ke->kv.offset(), a);
        if (removes_offset(*ke) && !set_score_term(ctx, *ke, first_row / n_cells + s, a))
            return "a restored state holds too few rows of " + name_of(k) + " to tell the offset that was removed from its keys";
        if (const char* error = check_attention_args(a)) return "attention over " + name_of(k) + ": " + error;
        if (ke->kv.exact())
            run_windowed(ctx, a, plain, *ke, *ve, first_row / n_cells + s);
        else
            run_call(ctx, a);
    }
    for (KvExtra* e : {ke, ve})
        if (e->kv.exact()) e->kv.exact()->trim(*e->positions);
    return {};
}

std::string compute_rope_shift(OpContext& ctx, const ggml_tensor* op) {
    KvExtra* e = kv_extra(op->src[0]);
    const ggml_tensor *x = op->src[0], *shift = op->src[1];
    if (!e || !e->problem().empty() || !e->kv.bound()) return "cannot shift " + problem_of(x);
    if (op->view_src != x->view_src || e->kv.geometry().side != Side::key)
        return "RoPE on " + name_of(op) + " is only supported in place (context shift)";
    if (op->op_params[2] & kRopeMultiAxis) return "context shift with M-RoPE positions is not supported; run without --context-shift";
    RopeParams p = without_magnitude(rope_params(op));
    p.n_offset += static_cast<int>(x->view_offs / sizeof(std::uint16_t));
    const std::int64_t n_rows = e->kv.geometry().n_cells * e->kv.geometry().n_streams;
    if (x->ne[2] != n_rows || shift->ne[0] < n_rows || p.n_offset + p.n_dims > e->kv.head_dim())
        return "context shift of a part of " + name_of(op) + " is not supported; run without --context-shift";

    e->kv.finish_restore(*ctx.kernels, *e->positions);
    e->kv.freeze();  // what was kept for measuring has the old positions
    const auto* delta = static_cast<const std::int32_t*>(shift->data);
    const int parts = ctx.executor->n_threads();
    ctx.executor->run(parts, [&](int ith) {
        // Whole tiles per thread: rows of one tile share bytes.
        std::vector<float> table(p.n_dims);
        std::int32_t table_for = 0;
        for (std::int64_t row = 0; row < n_rows; row++) {
            if (row % e->kv.geometry().n_cells / kTileKeys % parts != ith || delta[row] == 0) continue;
            if (table_for != delta[row]) rope_table(p, static_cast<float>(table_for = delta[row]), table);
            e->kv.rotate_row(row, p, table);
        }
    });
    if (e->kv.exact()) e->kv.exact()->rotate(p, {delta, static_cast<std::size_t>(n_rows)});
    if (e->positions) e->positions->shift({delta, static_cast<std::size_t>(n_rows)}, e->kv.shift_generation);
    return {};
}

}  // namespace turboquant::ggml
