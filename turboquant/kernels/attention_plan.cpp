// Cutting an attention call: blocks of rows x chunks of cells, and where everything lies in the workspace.
#include <algorithm>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

constexpr int kMaxRows = 64;       // rows that share one decode of a tile: their scores, weights and accumulators stay in the L2 cache
constexpr int kMinChunkTiles = 4;  // a chunk costs a merge of its accumulators; below this it does not pay

static_assert(turn_width(1) % kWidestVector == 0);

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

TermLayout term_layout(std::size_t rows, int n_freq, std::size_t n_terms) {
    TermLayout t{};
    t.n_pad = turn_width(n_freq);
    const std::size_t n = t.n_pad, half_tile = kTileKeys / 2;
    std::size_t end = 0;
    const auto take = [&](std::size_t floats) {
        const std::size_t at = end;
        end += floats;
        return at;
    };
    t.query_stride = rows * 2 * n;
    t.query = take(n_terms * t.query_stride);
    t.turned_a = take(rows * n), t.turned_b = take(rows * n);
    t.panel_cos = take(n * half_tile), t.panel_sin = take(n * half_tile);
    t.place = take(2 * n);
    t.out = take(rows * kTileKeys);
    t.even = take(rows * half_tile), t.odd = take(rows * half_tile);
    t.end = n ? end + kWidestVector : 0;  // a lane beyond the last row is read, and not used
    return t;
}

struct Layout {
    AttentionCall call;         // tables of the first head
    std::size_t scratch_bytes;  // of one thread
    int n_units, n_states;
    bool in_scratch;  // the state is a thread's own: no chunks
};

const CodecTables& head_tables(const TileView& view, int head) { return codec_tables(view.head_shape(head).codec, view.shape.head_dim); }

// Whether some head decodes to int8 panels, and whether some does to float ones.
struct Panels {
    bool i8 = false, f32 = false;
};
Panels panels_of(const TileView& view, int n_head_kv) {
    Panels p;
    for (int h = 0; h < (view.heads ? n_head_kv : 1); ++h) (head_tables(view, h).i8 ? p.i8 : p.f32) = true;
    return p;
}

Layout make_layout(const AttentionPlan& plan, const AttentionArgs& a) {
    Layout l{};
    AttentionCall& c = l.call;
    c.args = &a;
    c.k = &head_tables(a.k, 0);
    c.v = &head_tables(a.v, 0);
    c.group = a.n_head / a.n_head_kv;
    c.n_rows = a.n_tokens * c.group;
    c.rows_per_block = plan.rows_per_block;
    c.dim_v = a.v.shape.head_dim;
    const bool on_top = a.exact.on_top(), beside = a.exact.beside();
    if (on_top) c.k_residual = &residual_tables(a.k.shape.head_dim), c.v_residual = &residual_tables(c.dim_v);
    const std::size_t rows = plan.rows_per_block;
    c.state_floats = (rows * (2 + c.dim_v) + kWidestVector - 1) / kWidestVector * kWidestVector;
    std::size_t end = 0;
    const auto take = [&](std::size_t bytes) {
        const std::size_t at = end;
        end += (bytes + 127) / 128 * 128;
        return at;
    };
    const Panels k = panels_of(a.k, a.n_head_kv), v = panels_of(a.v, a.n_head_kv);
    const std::size_t k_size = k.f32 ? 4 : 1, v_size = v.f32 ? 4 : 1;
    c.q8 = take(k.i8 ? rows * c.k->head_dim : 0);
    c.qf = take((k.f32 || on_top ? rows : 1) * c.k->head_dim * sizeof(float));
    c.rows = take(rows * (kRowBytes + kWidestVector * sizeof(float) + 2 * sizeof(float)));  // Row, partial sums, alpha and step
    c.scores = take(rows * kTileKeys * sizeof(float));
    c.term_at = term_layout(rows, a.term.n_freq, a.term.n_terms);
    c.term = take(c.term_at.end * sizeof(float));
    c.weights = take(rows * kTileKeys * v_size);
    c.k_panel = take(c.k->head_dim * kTileKeys * k_size);
    c.v_panel = take(c.dim_v * kTileKeys * v_size);
    c.exact_list = take((on_top ? kTileKeys : a.exact.n) * sizeof(std::int32_t));
    const std::size_t tile_floats = on_top ? rows * kTileKeys : 0;
    c.residual = take(on_top ? kResidualGroup * std::max(c.k->head_dim, c.dim_v) + kWidestVector * sizeof(float) : 0);
    c.added = take(tile_floats * sizeof(float));
    c.taken = take(tile_floats * sizeof(float));
    l.in_scratch = plan.n_chunks == 1;
    c.state = take(l.in_scratch ? c.state_floats * sizeof(float) : 0);
    c.exact_state = take(l.in_scratch && beside ? c.state_floats * sizeof(float) : 0);
    l.scratch_bytes = end;
    l.n_units = a.n_head_kv * plan.n_row_blocks * plan.n_chunks;
    // Chunks of a block, then that of its exact rows.
    l.n_states = l.in_scratch ? 0 : l.n_units + (beside ? a.n_head_kv * plan.n_row_blocks : 0);
    return l;
}

AttentionUnit make_unit(const AttentionPlan& plan, const AttentionArgs& a, const AttentionCall& c, int index) {
    const int chunk = index % plan.n_chunks, block = index / plan.n_chunks % plan.n_row_blocks;
    AttentionUnit u{};
    u.kv_head = index / plan.n_chunks / plan.n_row_blocks;
    u.row_begin = block * plan.rows_per_block;
    u.n_rows = std::min(plan.rows_per_block, c.n_rows - u.row_begin);
    u.tile_begin = chunk * plan.tiles_per_chunk;
    u.tile_end = std::min(u.tile_begin + plan.tiles_per_chunk, ceil_div(a.n_kv, kTileKeys));
    u.k_tiles = a.k.head_tiles(u.kv_head), u.v_tiles = a.v.head_tiles(u.kv_head);
    return u;
}

AttentionCall call_for(const Layout& l, const AttentionArgs& a, const AttentionUnit& u) {
    AttentionCall c = l.call;
    if (a.k.heads) c.k = &head_tables(a.k, u.kv_head);
    if (a.v.heads) c.v = &head_tables(a.v, u.kv_head);
    return c;
}

float* chunk_state(const AttentionPlan& plan, const Layout& l, std::uint8_t* workspace, int unit) {
    return reinterpret_cast<float*>(workspace + plan.n_threads * l.scratch_bytes) + unit * l.call.state_floats;
}

// Of the block that a unit belongs to. The chunk with the last cells computes it: it may be the shortest.
float* exact_state(const AttentionPlan& plan, const AttentionArgs& a, const Layout& l, std::uint8_t* workspace, std::uint8_t* scratch,
                   int unit) {
    if (!a.exact.beside()) return nullptr;
    if (l.in_scratch) return reinterpret_cast<float*>(scratch + l.call.exact_state);
    return chunk_state(plan, l, workspace, l.n_units + unit / plan.n_chunks);
}

// Chunks per (head, row block) such that `n_threads` equal workers are busy for at least 9/10 of the time.
int choose_chunks(int n_blocks, int n_tiles, int n_threads) {
    const int most = std::max(1, n_tiles / kMinChunkTiles);
    for (int chunks = 1; chunks < most; ++chunks) {
        const int per_thread = ceil_div(n_blocks * chunks, n_threads);
        if (n_blocks * chunks * 10 >= per_thread * n_threads * 9) return chunks;
    }
    return most;
}

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& a, int n_threads) {
    AttentionPlan p;
    const int n_rows = a.n_tokens * (a.n_head / a.n_head_kv), n_tiles = ceil_div(a.n_kv, kTileKeys);
    p.n_threads = std::max(1, n_threads);
    p.n_row_blocks = ceil_div(n_rows, kMaxRows);
    p.rows_per_block = p.n_row_blocks ? ceil_div(n_rows, p.n_row_blocks) : 0;
    p.n_chunks = choose_chunks(std::max(1, a.n_head_kv * p.n_row_blocks), n_tiles, p.n_threads);
    p.tiles_per_chunk = ceil_div(n_tiles, p.n_chunks);
    p.n_chunks = p.tiles_per_chunk ? ceil_div(n_tiles, p.tiles_per_chunk) : 1;
    const Layout l = make_layout(p, a);
    p.workspace_bytes = p.n_threads * l.scratch_bytes + l.n_states * l.call.state_floats * sizeof(float);
    return p;
}

void run_attention(const Kernels& k, const AttentionPlan& plan, const AttentionArgs& a, std::uint8_t* workspace, int ith) {
    const Layout l = make_layout(plan, a);
    std::uint8_t* scratch = workspace + ith * l.scratch_bytes;
    bool term_panels_built = false;
    for (int i = ith; i < l.n_units; i += plan.n_threads) {
        AttentionUnit u = make_unit(plan, a, l.call, i);
        u.term_panels_built = &term_panels_built;
        if (i % plan.n_chunks == plan.n_chunks - 1) u.exact_state = exact_state(plan, a, l, workspace, scratch, i);
        float* state = l.in_scratch ? reinterpret_cast<float*>(scratch + l.call.state) : chunk_state(plan, l, workspace, i);
        const AttentionCall call = call_for(l, a, u);
        k.attend(call, u, scratch, state);
        if (l.in_scratch) k.finish(call, u, state, 1, 0, u.n_rows);
    }
}

void merge_attention(const Kernels& k, const AttentionPlan& plan, const AttentionArgs& a, std::uint8_t* workspace, int ith) {
    if (plan.n_chunks == 1) return;
    const Layout l = make_layout(plan, a);
    for (int i = 0; i < l.n_units; i += plan.n_chunks) {
        AttentionUnit u = make_unit(plan, a, l.call, i);
        u.exact_state = exact_state(plan, a, l, workspace, nullptr, i);
        const int first = u.n_rows * ith / plan.n_threads, last = u.n_rows * (ith + 1) / plan.n_threads;
        if (first < last) k.finish(call_for(l, a, u), u, chunk_state(plan, l, workspace, i), plan.n_chunks, first, last);
    }
}

void attention(const Kernels& k, const AttentionArgs& args) {
    const AttentionPlan plan = plan_attention(args, 1);
    std::vector<std::uint8_t> memory(plan.workspace_bytes + 64);
    auto* workspace = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    run_attention(k, plan, args, workspace, 0);
    merge_attention(k, plan, args, workspace, 0);
}

}  // namespace turboquant
