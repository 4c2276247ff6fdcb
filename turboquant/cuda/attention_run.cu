// Checks the arguments of a run and launches the kernel of its head size.
#include <algorithm>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/impl/instances.h"
#include "turboquant/cuda/impl/join_params.h"
#include "turboquant/cuda/impl/launch.h"
#include "turboquant/cuda/impl/params.h"
#include "turboquant/cuda/impl/shared_layout.h"
#include "turboquant/cuda/memory.h"
#include "turboquant/cuda/prefill.h"
#include "turboquant/cuda/workspace.h"

namespace turboquant::cuda {
namespace {

bool aligned(const Tiles& t) {
    return reinterpret_cast<std::uintptr_t>(t.tiles) % 16 == 0 && t.seq_stride % 16 == 0 && t.head_stride % 16 == 0 && t.tile_stride % 16 == 0;
}

const char* problem_of(const AttentionPlan& plan, const AttentionArgs& a, const void* workspace) {
    if (!a.tables || a.tables->head_dim != plan.head_dim) return "attention: tables of another head size";
    if (!a.q || !a.out || !workspace) return "attention: no query, output or workspace";
    if (!a.k.tiles || !a.v.tiles) return "attention: no tiles";
    if (!aligned(a.k) || !aligned(a.v)) return "attention: tiles and their strides must be multiples of 16 bytes";
    for (const Tiles* t : {&a.k, &a.v}) {
        if (!t->head_format && fragment_codec_index(t->codec) < 0) return "attention: composite formats have no CUDA kernel; run them on the CPU";
        if (!t->head_format != !t->head_at) return "attention: formats per head without places of the heads";
    }
    if (plan.exact_windows) {
        if (!a.exact_k.tiles || !a.exact_v.tiles || !a.exact_n) return "attention: planned with exact rows, but there are none";
        if (a.exact_k.codec != CodecId::raw || a.exact_v.codec != CodecId::raw) return "attention: exact rows must be raw tiles";
        if (!aligned(a.exact_k) || !aligned(a.exact_v)) return "attention: tiles and their strides must be multiples of 16 bytes";
    }
    if (a.max_bias != 0 && !a.mask) return "attention: ALiBi (max_bias) is applied to a mask, and there is none";
    if (a.mask && a.mask_heads < 1) return "attention: mask without heads";
    const Term& t = a.term;
    if (t.n_freq < 0 || (t.n_freq > 0 && (!(t.q_term || (t.mu && t.ids)) || !t.turns || !t.panel || !t.tile_pos || !t.cell_pos))) return "attention: incomplete score term";
    if (t.n_freq > 0 && !t.q_term && t.rope.n_dims != 2 * t.n_freq) return "attention: a term with dims that are not rotated needs q_term";
    if (a.mask_heads > 1 && a.mask_tiles) return "attention: what is said of tiles is of one mask";
    if (t.n_freq > 0 && (t.n_terms < 1 || t.n_terms > kMaxTerms)) return "attention: 1 to 4 key offsets can be served in one call";
    return nullptr;
}

SideParams side_of(const Tiles& t) {
    return {t.tiles, t.seq_stride, t.head_stride, t.tile_stride, t.head_at, t.head_format, std::max(0, fragment_codec_index(t.codec))};
}

AttentionParams params_of(const AttentionPlan& plan, const AttentionArgs& a, void* workspace) {
    const WorkspaceLayout w = workspace_layout(plan);
    auto* base = static_cast<std::uint8_t*>(workspace);
    AttentionParams p{};
    p.k = side_of(a.k), p.v = side_of(a.v), p.exact_k = side_of(a.exact_k), p.exact_v = side_of(a.exact_v);
    p.q = a.q, p.exact_q = a.exact_q, p.out = a.out, p.lse = a.lse;
    p.q_seq_stride = a.q_seq_stride, p.q_token_stride = a.q_token_stride, p.q_head_stride = a.q_head_stride;
    p.out_seq_stride = a.out_seq_stride, p.out_token_stride = a.out_token_stride, p.out_head_stride = a.out_head_stride;
    p.n_head = plan.n_head, p.n_head_kv = plan.n_head_kv, p.group = plan.n_head / plan.n_head_kv, p.n_tokens = plan.n_tokens;
    p.n_rows = p.group * p.n_tokens, p.n_row_blocks = plan.n_row_blocks;
    p.n_kv = plan.n_kv, p.seq_n_kv = a.seq_n_kv, p.exact_n = a.exact_n;
    static_assert(sizeof(AttentionItem) == sizeof(AttentionPlan::Item));
    p.items = plan.items.empty() ? nullptr : reinterpret_cast<const AttentionItem*>(base + w.items);
    p.n_seq = plan.n_seq, p.n_compressed = plan.n_items - (plan.exact_windows ? plan.n_seq : 0);
    p.splits_each = plan.splits_each, p.has_exact = plan.exact_windows, p.causal = a.causal, p.window = a.window;
    p.mask = a.mask, p.mask_seq_stride = a.mask_seq_stride, p.mask_token_stride = a.mask_token_stride, p.mask_head_stride = a.mask_head_stride;
    p.mask_heads = a.mask_heads, p.mask_tiles = a.mask ? a.mask_tiles : nullptr;
    p.exact_mask_tiles = a.exact_mask ? a.exact_mask_tiles : nullptr, p.exact_tiles = a.exact_tiles;
    p.exact_mask = a.exact_mask, p.exact_mask_seq_stride = a.exact_mask_seq_stride, p.exact_mask_token_stride = a.exact_mask_token_stride;
    p.scale = a.scale, p.softcap = a.logit_softcap, p.max_bias = a.max_bias, p.sinks = a.sinks;
    if (const Term& t = a.term; t.n_freq > 0)
        p.term = {t.n_freq, term_pad(t.n_freq), t.n_terms, t.q_term, t.mu, t.mu_stride, t.ids, t.rope.n_dims / 2, t.rope.n_offset, t.rope.adjacent, t.q_seq_stride, reinterpret_cast<const float2*>(t.turns),
                  static_cast<const uint4*>(t.panel), t.tile_pos, t.cell_pos, t.cell_term, t.tile_seq_stride, t.cell_seq_stride, t.offset, t.dim_freq};
    p.signs_in = a.tables->signs_in, p.signs_out = a.tables->signs_out, p.hartley = a.tables->hartley, p.lut = a.tables->lut;
    std::copy(std::begin(a.tables->formats), std::end(a.tables->formats), p.table);
    p.count = reinterpret_cast<unsigned*>(base + w.count);
    p.part = reinterpret_cast<float*>(base + w.part), p.part_ml = reinterpret_cast<float2*>(base + w.part_ml);
    return p;
}

Status run_tiles(const AttentionPlan& plan, const AttentionArgs& a, void* workspace, Stream stream, bool parts_only) {
    if (const char* problem = problem_of(plan, a, workspace)) return bad_argument(problem);
    AttentionParams p = params_of(plan, a, workspace);
    if (!parts_only && prefill_serves(plan, a)) return run_prefill(plan, p, a.codes_ready, workspace, stream);
    if (a.codes_ready)
        if (const Status status = wait_for(stream, a.codes_ready); !status.ok()) return status;
    const bool one_format = !a.k.head_format && !a.v.head_format && a.k.codec == a.v.codec;
    const void* kernel = attend_instance(plan.head_dim, plan.groups, {one_format ? p.k.codec : kAnyFormat, p.term.n_freq > 0});
    if (!kernel) return bad_argument("attention: the plan names a kernel that does not exist");

    const auto first = [&] { return shared_layout(plan.head_dim, plan.groups, p.term.panel ? p.term.n_pad : 0, p.term.n_terms, 0).bytes; };
    if (first() > plan.shared_per_block) p.term.panel = nullptr;  // the term key by key: slower, the same result
    const std::size_t shared = std::max(first(), shared_layout(plan.head_dim, plan.groups, 0, 0, plan.most_splits).bytes);
    if (const Status status = allow_shared(kernel, shared, "attention: shared memory"); !status.ok()) return status;
    p.parts_only = parts_only;
    void* args[] = {&p};
    const int of_head = plan.n_items * plan.n_row_blocks;
    const dim3 grid = plan.exact_windows ? dim3(of_head * plan.n_head_kv) : dim3(of_head, plan.n_head_kv);
    return launch(kernel, grid, dim3(32 * kWarps), args, shared, stream, a.beside_keeping && plan.exact_windows, "attention: launch");
}

}  // namespace

Status prepare_workspace(const AttentionPlan& plan, void* workspace, Stream stream) {
    const WorkspaceLayout w = workspace_layout(plan);
    auto* base = static_cast<std::uint8_t*>(workspace);
    const auto s = static_cast<cudaStream_t>(stream);
    if (const auto e = cudaMemsetAsync(base + w.count, 0, w.items - w.count, s)) return status_of(e, "attention workspace: clear");
    if (plan.items.empty()) return {};
    if (const auto e = cudaMemcpyAsync(base + w.items, plan.items.data(), plan.items.size() * sizeof(AttentionPlan::Item), cudaMemcpyHostToDevice, s))
        return status_of(e, "attention workspace: copy");
    return status_of(cudaStreamSynchronize(s), "attention workspace");
}

Status run_attention(const AttentionPlan& plan, const AttentionArgs& a, void* workspace, Stream stream) {
    return run_tiles(plan, a, workspace, stream, false);
}

bool can_split(const AttentionPlan& plan, const AttentionArgs& a, const KeepRows& keys, const KeepRows& values) {
    const auto kept = [&](const KeepRows& rows) {
        return rows.n > 0 && rows.n <= kMostNewRows && rows.slots && rows.signs && rows.tiles && rows.n_head == plan.n_head_kv && rows.head_dim == plan.head_dim;
    };
    return plan.exact_windows && !prefill_serves(plan, a) && kept(keys) && kept(values) && keys.n == values.n && join_instance(plan.head_dim, keys.n == 1);
}

Status run_before_rows(const AttentionPlan& plan, const AttentionArgs& a, void* workspace, Stream stream) {
    if (!plan.exact_windows) return bad_argument("attention: rows of the step apart, but planned without exact rows");
    return run_tiles(plan, a, workspace, stream, true);
}

Status run_with_rows(const AttentionPlan& plan, const AttentionArgs& a, const NewRows& rows, void* workspace, Stream stream) {
    if (const char* problem = problem_of(plan, a, workspace)) return bad_argument(problem);
    if (!plan.exact_windows || !join_instance(plan.head_dim, rows.keys.n == 1)) return bad_argument("attention: rows of the step apart are not for this call");
    if (rows.keys.n < 1 || rows.keys.n > kMostNewRows || rows.values.n != rows.keys.n || !rows.mask) return bad_argument("attention: rows of the step: none, too many, or no mask");
    AttentionParams p = params_of(plan, a, workspace);
    JoinParams j{{{rows.keys, rows.values}}, rows.keys.n, 4 * plan.groups, rows.mask};
    void* args[] = {&p, &j};
    const int n_join = plan.n_seq * plan.n_head_kv * p.n_rows, n_keep = rows.keep ? (2 * j.n * plan.n_head_kv + kWarps - 1) / kWarps : 0;
    return launch(join_instance(plan.head_dim, j.n == 1), dim3(n_join + n_keep), dim3(32 * kWarps), args, 0, stream, false, "attention: rows of the step");
}

}  // namespace turboquant::cuda
