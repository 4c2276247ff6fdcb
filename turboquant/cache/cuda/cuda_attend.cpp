// Attention of a store on a GPU: an attention call of the host's kind becomes one or two of the GPU's.
#include <algorithm>
#include <vector>

#include "turboquant/cache/cuda/cuda_store.h"

namespace turboquant {
namespace {

constexpr int kDecodeTokens = 8;  // up to so many query tokens exact rows are one more part of the same call

/// Masks of the exact rows by slot: slots that no row of the call lies in are hidden.
void set_exact_rows(Queue& q, const AttentionArgs& a, Queue::Step& s) {
    s.n_slots = a.exact.n ? *std::max_element(a.exact.k_slots, a.exact.k_slots + a.exact.n) + 1 : 0;
    if (!s.n_slots) return;
    s.exact_stride = (static_cast<std::size_t>(s.n_slots) + kTileKeys - 1) / kTileKeys * kTileKeys;
    std::vector<std::uint16_t> mask(a.n_tokens * s.exact_stride, kMaskHidden);
    for (int t = 0; t < a.n_tokens; t++)
        for (int i = 0; i < a.exact.n; i++)
            mask[t * s.exact_stride + a.exact.k_slots[i]] = a.exact.mask[static_cast<std::size_t>(t) * a.exact.n + i];
    q.refresh(s.exact_mask, mask.data(), mask.size());
    const std::int32_t n[2] = {s.n_slots, 0};
    q.refresh(s.exact_n, n, 2);
}

void set_mask(Queue& q, const AttentionArgs& a, Queue::Step& s) {
    s.mask = a.mask, s.mask_stride = a.mask_token_stride;
    if (!a.patch.tile) return;
    const int n_tiles = (a.n_kv + kTileKeys - 1) / kTileKeys, n = *std::max_element(a.patch.tile, a.patch.tile + n_tiles) + 1;
    if (n == 0) return;
    cuda::PatchMask p;
    p.mask = a.mask, p.token_stride = a.mask_token_stride, p.n_tokens = a.n_tokens, p.n_kv = a.n_kv;
    p.tile = q.refresh(s.tile, a.patch.tile, n_tiles);
    p.halves = q.refresh(s.halves, a.patch.halves, static_cast<std::size_t>(n) * a.n_tokens * kTileKeys);
    p.out_stride = static_cast<std::size_t>(n_tiles) * kTileKeys;
    q.reserve(s.patched, p.out_stride * a.n_tokens * sizeof(std::uint16_t));
    p.out = s.patched.as<std::uint16_t>();
    q.launch([p](const Lanes& lanes) { return cuda::patch_mask(p, lanes.main); });
    s.mask = p.out, s.mask_stride = p.out_stride;
}

void set_cells(Queue& q, const AttentionArgs& a, Queue::Step& s) {
    if (!a.term.n_freq) return;
    s.max_position = -1;
    for (int i = 0; i < a.n_kv; i++) s.max_position = std::max(s.max_position, a.term.cell_pos[i]);
    cuda::Term t;
    t.cell_pos = q.refresh(s.cell_pos, a.term.cell_pos, a.n_kv);
    t.cell_term = q.refresh(s.cell_term, a.term.cell_term, a.n_kv);
    const std::size_t tiles = (static_cast<std::size_t>(a.n_kv) + kTileKeys - 1) / kTileKeys;
    q.reserve(s.tile_pos, tiles * sizeof(std::int32_t));
    q.launch([t, n_kv = a.n_kv, out = s.tile_pos.as<std::int32_t>()](const Lanes& lanes) {
        return cuda::summarize_positions(t, 1, n_kv, nullptr, out, lanes.main);
    });
}

void launch_attention(Queue& q, const cuda::AttentionShape& shape, const cuda::AttentionArgs& args) {
    const Queue::PlannedAttention& p = q.plan(shape);
    q.launch([plan = &p.plan, number = p.number, args, workspace = p.workspace.as<void>()](const Lanes& lanes) {
        static_cast<void>(number);  // tells plans apart that lie in the same place, one after the other
        return cuda::run_attention(*plan, args, workspace, lanes.main);
    });
}

}  // namespace

/// Scaled queries and the terms of the offsets. False: more offsets than a call can have.
bool CudaStore::set_term(Queue& q, const Queue::Step& step, const QueryTransform& queries, AttentionArgs& a, cuda::AttentionArgs& c) const {
    const KeyTransform& keys = queries.keys;
    if (queries.ids.size() > cuda::kMaxTerms) return false;
    sync_offsets(q, keys);
    const auto d = static_cast<std::size_t>(layout_.head_dim()), rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    const int n_terms = static_cast<int>(queries.ids.size());
    cuda::TransformQueries t;
    t.q = a.q, t.token_stride = a.q_token_stride, t.head_stride = a.q_head_stride;
    t.n_tokens = a.n_tokens, t.n_head = a.n_head, t.n_head_kv = a.n_head_kv, t.head_dim = layout_.head_dim();
    if (keys.scales) {
        t.scales = scales_.as<float>(), t.scaled = q.memory<float>(Queue::Use::queries, rows * d);
        a.q = t.scaled, a.q_head_stride = d, a.q_token_stride = a.n_head * d;
    }
    if (n_terms) {
        t.mu = offsets_.as<float>(), t.mu_stride = offset_size(), t.n_terms = n_terms, t.n_freq = keys.rope.n_freq,
        t.rope = rope_layout(keys.rope);
        const std::vector<std::int32_t> ids(queries.ids.begin(), queries.ids.end());
        t.ids = q.upload<std::int32_t>(Queue::Use::term_ids, ids);
        t.terms = q.memory<float>(Queue::Use::terms, n_terms * rows * 2 * t.n_freq);
        const DeviceTables::Term tables = q.tables().term(keys.rope.frequencies, step.max_position);
        c.term.n_freq = t.n_freq, c.term.q_term = t.terms, c.term.n_terms = n_terms;
        c.term.turns = tables.turns, c.term.panel = tables.panel;
        c.term.cell_pos = step.cell_pos.array.as<std::int32_t>(), c.term.cell_term = step.cell_term.array.as<std::uint8_t>();
        c.term.tile_pos = step.tile_pos.as<std::int32_t>(), c.term.dim_freq = dim_freq_.as<std::uint8_t>();
        c.term.offset = offsets_.as<float>() + queries.ids[0] * offset_size();
        if (n_terms > 1) {
            auto* all = q.memory<float>(Queue::Use::offsets, n_terms * offset_size());
            for (int i = 0; i < n_terms; i++)
                q.launch(
                    [to = all + i * offset_size(), from = offsets_.as<float>() + queries.ids[i] * offset_size(),
                     bytes = offset_size() * sizeof(float)](const Lanes& lanes) { return cuda::copy_tiles(to, from, bytes, lanes.main); });
            c.term.offset = all;
        }
    }
    q.launch([t](const Lanes& lanes) { return cuda::transform_queries(t, lanes.main); });
    return true;
}

const char* CudaStore::attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, AttentionArgs a,
                              const QueryTransform* queries, std::uint64_t plan_number) const {
    const auto& v = static_cast<const CudaStore&>(values);
    if (a.v_is_k || &v == this) return "values within keys (MLA) are not attended to on a GPU: take the CPU's device";
    if (v.layout_.head_dim() != layout_.head_dim()) return "keys and values with heads of different sizes: take the CPU's device";
    if (a.exact.n && a.mask_heads > 1) return "exact windows with a mask per head: switch the windows off (sink=0,recent=0)";
    Queue& q = Queue::of(ctx, device_);
    if (!a.exact.n) q.settle();
    Queue::Step& step = q.step(plan_number, [&](Queue::Step& s) { set_exact_rows(q, a, s), set_mask(q, a, s), set_cells(q, a, s); });

    cuda::AttentionArgs c;
    c.tables = &q.tables().attention(layout_.head_dim());
    const float* model_q = a.q;
    const bool same_strides =
        a.q_head_stride == static_cast<std::size_t>(layout_.head_dim()) && a.q_token_stride == a.n_head * a.q_head_stride;
    if (queries && !set_term(q, step, *queries, a, c))
        return "more than four sequences that measured offsets of their own are visible at once: give every sequence its own stream (no "
               "--kv-unified), or take the CPU's device";
    if (step.n_slots && a.q != model_q && !same_strides) return "scaled keys with exact windows need queries without gaps";
    c.q = a.q, c.q_token_stride = a.q_token_stride, c.q_head_stride = a.q_head_stride;
    c.out = a.out, c.out_token_stride = a.out_token_stride, c.out_head_stride = a.out_head_stride;
    c.k = tiles(stream), c.v = v.tiles(stream);
    if (step.n_slots) {
        c.exact_k = exact_tiles(), c.exact_v = v.exact_tiles();
        c.exact_n = step.exact_n.array.as<std::int32_t>(), c.exact_q = model_q;
        c.exact_mask = step.exact_mask.array.as<std::uint16_t>(), c.exact_mask_token_stride = step.exact_stride;
    }
    // A mask of the step's own is of one head.
    c.mask = step.mask, c.mask_token_stride = step.mask_stride;
    if (step.mask == a.mask) c.mask_head_stride = a.mask_head_stride, c.mask_heads = a.mask_heads;
    c.scale = a.scale, c.logit_softcap = a.logit_softcap, c.max_bias = a.max_bias, c.sinks = a.sinks;

    std::vector<CodecId> formats = formats_;
    formats.insert(formats.end(), v.formats_.begin(), v.formats_.end());
    const int n_kv[] = {a.n_kv};
    const bool apart = step.n_slots && a.n_tokens > kDecodeTokens;
    cuda::AttentionShape shape{layout_.head_dim(),         a.n_head, a.n_head_kv, a.n_tokens,       n_kv,
                               step.n_slots > 0 && !apart, true,     formats,     c.term.n_freq > 0};
    const std::size_t rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    if (apart) c.lse = q.memory<float>(Queue::Use::lse, rows);
    launch_attention(q, shape, c);
    if (!apart) return nullptr;

    // Many queries: exact rows by a call of their own over no tiles, since tensor cores take the tiles alone.
    cuda::AttentionArgs e = c;
    cuda::MergeResults m;
    m.a = c.out, m.a_token_stride = c.out_token_stride, m.a_head_stride = c.out_head_stride, m.a_lse = c.lse;
    e.lse = q.memory<float>(Queue::Use::other_lse, rows), e.out = q.memory<float>(Queue::Use::other, rows * layout_.head_dim());
    m.b = e.out, m.b_lse = e.lse, m.n_tokens = a.n_tokens, m.n_head = a.n_head, m.head_dim = layout_.head_dim();
    e.out_head_stride = layout_.head_dim(), e.out_token_stride = a.n_head * e.out_head_stride;
    e.seq_n_kv = c.exact_n + 1, e.sinks = nullptr, e.term = {};
    const int none[] = {kTileKeys};
    shape.n_kv = none, shape.exact_windows = true, shape.formats = {}, shape.term = false;
    launch_attention(q, shape, e);
    q.launch([m](const Lanes& lanes) { return cuda::merge_results(m, lanes.main); });
    return nullptr;
}

}  // namespace turboquant
