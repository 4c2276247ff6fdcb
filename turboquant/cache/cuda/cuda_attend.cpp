// Attention of a store on a GPU: an attention call of the host's kind becomes one of the GPU's.
#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "turboquant/cache/cuda/cuda_store.h"
#include "turboquant/cuda/masks.h"

namespace turboquant {
namespace {

using Calls = std::span<const TileStore::StreamCall>;

std::size_t tiles_of(int n_kv) { return (static_cast<std::size_t>(n_kv) + kTileKeys - 1) / kTileKeys; }

const std::uint8_t* summarize(Queue& q, cuda::DeviceArray& memory, cuda::MaskTiles m) {
    q.reserve(memory, static_cast<std::size_t>(m.n_seq) * m.n_tokens * tiles_of(m.n_kv));
    m.out = memory.as<std::uint8_t>();
    q.launch([m](const Lanes& lanes) { return cuda::summarize_mask(m, lanes.main); });
    return m.out;
}

/// Slots of the rows that the step makes, if they are few.
void set_new_slots(Queue& q, Queue::Step& s, std::span<const std::int32_t> slots) {
    const bool known = !slots.empty() && slots.size() <= cuda::kMostNewRows &&
                       std::ranges::all_of(slots, [&](std::int32_t slot) { return slot >= 0 && slot < s.n_slots; });
    s.new_slots.assign(slots.begin(), known ? slots.end() : slots.begin());
    if (known) q.refresh(s.slots_of_new, slots.data(), slots.size());
}

/// Which rows are exact, by slot. `capacity`: slots that there are; where few tokens are asked for, masks are that wide, so that launches stay
/// the same while windows fill.
void set_exact_rows(Queue& q, Calls calls, Queue::Step& s, std::size_t capacity) {
    std::vector<std::int32_t> n;
    for (const auto& c : calls) {
        const ExactRowsView& e = c.args.exact;
        n.push_back(e.n ? *std::max_element(e.k_slots, e.k_slots + e.n) + 1 : 0);
    }
    s.n_slots = *std::ranges::max_element(n);
    if (!s.n_slots) return;
    s.exact_stride = std::max(tiles_of(s.n_slots) * kTileKeys, calls[0].args.n_tokens <= kDraftTokens ? capacity : 0);
    std::vector<std::int32_t> cells(calls.size() * s.exact_stride, -1), positions(cells.size(), -1);
    for (std::size_t i = 0; i < calls.size(); i++)
        for (int row = 0; row < calls[i].args.exact.n; row++) {
            const std::size_t at = i * s.exact_stride + calls[i].args.exact.k_slots[row];
            cells[at] = calls[i].args.exact.cells[row], positions[at] = calls[i].exact_positions[row];
        }
    q.refresh(s.exact_cells, cells.data(), cells.size());
    q.refresh(s.exact_positions, positions.data(), positions.size());
    q.refresh(s.exact_n, n.data(), n.size());
    set_new_slots(q, s, q.kept_slots());
}

/// The masks of a call with exact rows.
void split_mask(Queue& q, Calls calls, Queue::Step& s, const WindowSizes& windows) {
    const AttentionArgs& a = calls[0].args;
    cuda::WindowMasks w;
    w.mask = s.mask, w.token_stride = s.mask_stride, w.seq_stride = s.mask_seq_stride;
    w.n_seq = static_cast<int>(calls.size()), w.n_tokens = a.n_tokens, w.n_kv = a.n_kv;
    w.cells = s.exact_cells.array.as<std::int32_t>(), w.positions = s.exact_positions.array.as<std::int32_t>();
    w.n_slots = static_cast<int>(s.exact_stride), w.sink = windows.sink, w.recent = windows.recent;
    const std::size_t rows = calls.size() * a.n_tokens;
    const auto masks = [&](cuda::DeviceArray& array, std::size_t each) {
        q.reserve(array, rows * each * sizeof(std::uint16_t));
        return array.as<std::uint16_t>();
    };
    w.out_stride = tiles_of(a.n_kv) * kTileKeys;
    w.out = masks(s.own_mask, w.out_stride), w.exact = masks(s.exact_mask, s.exact_stride);
    if (!s.new_slots.empty()) {
        w.new_slots = s.slots_of_new.array.as<std::int32_t>(), w.n_new = static_cast<int>(s.new_slots.size());
        w.fresh = masks(s.new_mask, w.n_new), w.old = masks(s.old_mask, s.exact_stride);
    }
    q.launch([w](const Lanes& lanes) { return cuda::window_masks(w, lanes.main); });
    s.mask = w.out, s.mask_stride = w.out_stride, s.mask_seq_stride = a.n_tokens * w.out_stride;
    s.exact_mask_tiles =
        a.n_tokens <= kDecodeTokens
            ? nullptr
            : summarize(q, s.of_exact_mask, {w.exact, a.n_tokens * s.exact_stride, s.exact_stride, w.n_seq, a.n_tokens, w.n_slots});
}

void set_mask(Queue& q, Calls calls, Queue::Step& s, const WindowSizes& windows) {
    const AttentionArgs& a = calls[0].args;
    s.mask = a.mask, s.mask_stride = a.mask_token_stride, s.has_own_mask = s.n_slots > 0;
    s.mask_seq_stride = calls.size() > 1 && a.mask ? calls[1].args.mask - a.mask : 0;
    s.mask_tiles = s.exact_mask_tiles = nullptr;
    if (s.has_own_mask) split_mask(q, calls, s, windows);
    if (s.mask && (s.has_own_mask || a.mask_heads == 1))
        s.mask_tiles =
            summarize(q, s.of_mask, {s.mask, s.mask_seq_stride, s.mask_stride, static_cast<int>(calls.size()), a.n_tokens, a.n_kv});
}

/// Positions and terms of the cells, in one piece; the device has them already if they are what they were the time before. Room for all cells
/// of the cache at once: for more of it the host would wait within a prompt.
void send_cells(Queue& q, Calls calls, Queue::Step& s, std::size_t n_cells) {
    const int n_kv = calls[0].args.n_kv;
    std::vector<std::uint64_t> numbers;
    for (const auto& c : calls) numbers.push_back(c.args.term.n_freq ? c.cells : 0);
    if (numbers == s.cells && std::ranges::find(numbers, 0u) == numbers.end()) return;
    s.cells.clear();
    q.reserve(s.cell_pos, calls.size() * n_cells * sizeof(std::int32_t)), q.reserve(s.cell_term, calls.size() * n_cells);
    const auto take = [&](const std::int32_t* pos, const std::uint8_t* term, std::size_t n) {
        s.max_position = *std::max_element(pos, pos + n);
        q.refresh(s.cell_pos, pos, n), q.refresh(s.cell_term, term, n);
    };
    if (calls.size() == 1) {
        take(calls[0].args.term.cell_pos, calls[0].args.term.cell_term, n_kv);
    } else {
        std::vector<std::int32_t> pos(calls.size() * s.cell_seq_stride, -1);
        std::vector<std::uint8_t> term(pos.size());
        for (std::size_t i = 0; i < calls.size(); i++) {
            const ScoreTerm& of = calls[i].args.term;
            if (!of.n_freq) continue;
            std::copy_n(of.cell_pos, n_kv, pos.data() + i * s.cell_seq_stride);
            std::copy_n(of.cell_term, n_kv, term.data() + i * s.cell_seq_stride);
        }
        take(pos.data(), term.data(), pos.size());
    }
    s.cells = std::move(numbers);
}

void set_cells(Queue& q, Calls calls, Queue::Step& s, std::int64_t n_cells) {
    const AttentionArgs& a = calls[0].args;
    s.cell_seq_stride = tiles_of(a.n_kv) * kTileKeys;
    if (std::ranges::none_of(calls, [](const auto& c) { return c.args.term.n_freq > 0; })) {
        s.max_position = -1, s.cells.clear();
        return;
    }
    const std::size_t most_tiles = tiles_of(static_cast<int>(n_cells));
    send_cells(q, calls, s, most_tiles * kTileKeys);
    cuda::Term t;
    t.cell_pos = s.cell_pos.array.as<std::int32_t>(), t.cell_term = s.cell_term.array.as<std::uint8_t>();
    t.cell_seq_stride = s.cell_seq_stride, t.tile_seq_stride = tiles_of(a.n_kv);
    q.reserve(s.tile_pos, calls.size() * most_tiles * sizeof(std::int32_t));
    q.launch([t, n_kv = a.n_kv, n_seq = static_cast<int>(calls.size()), out = s.tile_pos.as<std::int32_t>()](const Lanes& lanes) {
        return cuda::summarize_positions(t, n_seq, n_kv, nullptr, out, lanes.main);
    });
}

/// A call as it is given to a stream; or the first of its two launches (cuda::can_split).
auto attention_on(const Queue::PlannedAttention& p, const cuda::AttentionArgs& args,
                  decltype(&cuda::run_attention) run = &cuda::run_attention) {
    return [plan = &p.plan, number = p.number, args, workspace = p.workspace.as<void>(), run](cuda::Stream stream) {
        static_cast<void>(number);  // tells plans apart that lie in the same place, one after the other
        return run(*plan, args, workspace, stream);
    };
}
/// The second.
auto with_rows_on(const Queue::PlannedAttention& p, const cuda::AttentionArgs& args, const cuda::NewRows& rows) {
    return [plan = &p.plan, number = p.number, args, rows, workspace = p.workspace.as<void>()](const Lanes& lanes) {
        static_cast<void>(number);
        return cuda::run_with_rows(*plan, args, rows, workspace, lanes.main);
    };
}

/// Whether what a call writes lies where the model made these rows, which were free when they were kept.
bool overlap(const cuda::AttentionShape& shape, const cuda::AttentionArgs& a, const cuda::KeepRows& rows) {
    const float *begin = a.out, *end = a.out + (shape.n_kv.size() - 1) * a.out_seq_stride + (shape.n_tokens - 1) * a.out_token_stride +
                                       (shape.n_head - 1) * a.out_head_stride + shape.head_dim;
    return std::less<>()(begin, rows.x + (rows.n - 1) * rows.stride + rows.n_head * rows.head_dim) && std::less<>()(rows.x, end);
}

/// True: in two launches, whatever else was given in between: it must not change how is rounded. The first begins when queries are there, if
/// nothing was.
bool launch_attention(Queue& q, const Queue::Step& step, const cuda::AttentionShape& shape, cuda::AttentionArgs args) {
    const Queue::PlannedAttention& p = q.plan(shape);
    const cuda::KeepRows* kept = step.new_slots.empty() ? nullptr : q.kept_pair(step.new_slots);
    const bool overwrites = std::ranges::any_of(q.kept(), [&](const cuda::KeepRows& rows) { return overlap(shape, args, rows); });
    if (kept && !overwrites && cuda::can_split(p.plan, args, kept[0], kept[1])) {
        cuda::NewRows rows{kept[0], kept[1], step.new_mask.as<std::uint16_t>(), false};
        args.exact_mask = step.old_mask.as<std::uint16_t>();
        // Where the launch that kept them was done, the data of its arguments may be another's by now.
        rows.keep = q.drop_keeping();
        const auto before = attention_on(p, args, &cuda::run_before_rows);
        // Not where rows of a restored state were moved or encoded just now.
        if (rows.keep && q.only_kept())
            q.early(before);
        else
            q.launch([before](const Lanes& lanes) { return before(lanes.main); });
        q.launch(with_rows_on(p, args, rows));
        return true;
    }
    args.beside_keeping = q.keeping();
    q.launch([run = attention_on(p, args)](const Lanes& lanes) { return run(lanes.main); });
    if (overwrites) q.forget_kept();  // calls of other streams follow
    return false;
}

/// The call on the first cells of its first sequence: what is wanted is its code.
void rehearse_attention(Queue& q, cuda::AttentionShape shape, cuda::AttentionArgs args, bool split) {
    constexpr int kCells = 1024;
    if (shape.n_tokens > kDecodeTokens) return;
    const int n_kv = std::min(shape.n_kv[0], kCells);
    shape.n_kv = {&n_kv, 1};
    const std::size_t row = static_cast<std::size_t>(shape.n_head) * shape.head_dim;
    args.codes_ready = nullptr;  // it is given before this graph has encoded: the event would be an older one
    args.out = q.memory<float>(Queue::Use::rehearsed, shape.n_tokens * row);
    args.out_token_stride = row, args.out_seq_stride = 0, args.out_head_stride = shape.head_dim;
    q.rehearse([run = attention_on(q.plan(shape, true), args, split ? &cuda::run_before_rows : &cuda::run_attention)](const Lanes& lanes) {
        return run(lanes.main);
    });
}

}  // namespace

/// Scaled queries and the terms of the offsets. False: more offsets than a call can have.
bool CudaStore::set_term(Queue& q, const Queue::Step& step, Calls calls, bool prefill, AttentionArgs& a, cuda::AttentionArgs& c) const {
    const KeyTransform& keys = calls[0].queries->keys;
    std::size_t most = 0;
    for (const StreamCall& call : calls) most = std::max(most, call.queries->ids.size());
    if (most > cuda::kMaxTerms) return false;
    sync_offsets(q, keys);
    const auto d = static_cast<std::size_t>(layout_.head_dim()), rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    const int n_terms = static_cast<int>(most);
    cuda::TransformQueries t;
    t.q = a.q, t.token_stride = a.q_token_stride, t.head_stride = a.q_head_stride;
    t.n_seq = static_cast<int>(calls.size()), t.seq_stride = c.q_seq_stride;
    t.n_tokens = a.n_tokens, t.n_head = a.n_head, t.n_head_kv = a.n_head_kv, t.head_dim = layout_.head_dim();
    if (keys.scales) {
        t.scales = scales_.as<float>(), t.scaled = q.memory<float>(Queue::Use::queries, calls.size() * rows * d);
        a.q = t.scaled, a.q_head_stride = d, a.q_token_stride = a.n_head * d, c.q_seq_stride = rows * d;
    }
    if (n_terms) {
        t.mu = offsets_.as<float>(), t.mu_stride = offset_size(), t.n_terms = n_terms, t.n_freq = keys.rope.n_freq,
        t.rope = rope_layout(keys.rope);
        const int any =
            std::ranges::max_element(calls, {}, [](const StreamCall& call) { return call.queries->ids.size(); })->queries->ids[0];
        std::vector<std::int32_t> ids;
        for (const StreamCall& call : calls)
            for (std::size_t i = 0; i < most; i++) ids.push_back(i < call.queries->ids.size() ? call.queries->ids[i] : any);
        t.ids = q.upload<std::int32_t>(Queue::Use::term_ids, ids);
        const DeviceTables::Term tables = q.tables().term(keys.rope.frequencies, step.max_position, static_cast<int>(layout_.n_cells()));
        c.term.n_freq = t.n_freq, c.term.n_terms = n_terms;
        if (keys.scales || t.rope.n_dims != 2 * t.n_freq) {
            t.terms = q.memory<float>(Queue::Use::terms, calls.size() * n_terms * rows * 2 * t.n_freq);
            c.term.q_term = t.terms, c.term.q_seq_stride = n_terms * rows * 2 * t.n_freq;
        } else {
            c.term.mu = t.mu, c.term.mu_stride = t.mu_stride, c.term.ids = t.ids, c.term.rope = t.rope;
        }
        c.term.turns = tables.turns, c.term.panel = tables.panel;
        c.term.cell_pos = step.cell_pos.array.as<std::int32_t>(), c.term.cell_term = step.cell_term.array.as<std::uint8_t>();
        c.term.tile_pos = step.tile_pos.as<std::int32_t>(), c.term.dim_freq = dim_freq_.as<std::uint8_t>();
        c.term.cell_seq_stride = step.cell_seq_stride, c.term.tile_seq_stride = tiles_of(a.n_kv);
        // Prefill wants the offsets themselves. Steps do not: launches that name an offset would be others for the next sequence.
        c.term.offset = prefill ? offsets_.as<float>() + ids[0] * offset_size() : nullptr;
        if (prefill && n_terms > 1) {
            auto* all = q.memory<float>(Queue::Use::offsets, n_terms * offset_size());
            for (int i = 0; i < n_terms; i++)
                q.launch(
                    [to = all + i * offset_size(), from = offsets_.as<float>() + ids[i] * offset_size(),
                     bytes = offset_size() * sizeof(float)](const Lanes& lanes) { return cuda::copy_tiles(to, from, bytes, lanes.main); });
            c.term.offset = all;
        }
    }
    if (t.scaled || t.terms) q.launch([t](const Lanes& lanes) { return cuda::transform_queries(t, lanes.main); });
    return true;
}

const char* CudaStore::attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const {
    return attend_together(ctx, values, stream, {&call, 1});
}

void CudaStore::see_cells(StoreContext& ctx, const StepMask& m, std::vector<std::uint16_t>& seen) const {
    const std::span<const std::uint64_t> words = Queue::of(ctx, device_).see_cells({m.mask, m.token_stride, m.n_tokens, m.n_kv, nullptr});
    seen.resize(m.n_kv);
    for (std::size_t j = 0; j < seen.size(); j++) seen[j] = words[j / 64] >> j % 64 & 1;
}

/// Few tokens of streams whose queries, results and masks lie evenly go in one call.
const char* CudaStore::attend_streams(StoreContext& ctx, const TileStore& values, std::int64_t first_stream, Calls calls) const {
    const auto evenly = [&](auto member) {
        for (std::size_t i = 2; i < calls.size(); i++)
            if (member(calls[i]) - member(calls[i - 1]) != member(calls[1]) - member(calls[0])) return false;
        return calls.size() > 1 && member(calls[1]) >= member(calls[0]);
    };
    const AttentionArgs& a = calls[0].args;
    const bool together = a.n_tokens <= kDecodeTokens && a.mask_heads == 1 && evenly([](const StreamCall& c) { return c.args.q; }) &&
                          evenly([](const StreamCall& c) { return c.args.out; }) &&
                          evenly([](const StreamCall& c) { return c.args.mask; }) && std::ranges::all_of(calls, [&](const StreamCall& c) {
                              return c.plan != 0 && !c.queries == !calls[0].queries && !c.args.mask == !a.mask;
                          });
    return together ? attend_together(ctx, values, first_stream, calls) : TileStore::attend_streams(ctx, values, first_stream, calls);
}

/// One call of the GPU.
const char* CudaStore::attend_together(StoreContext& ctx, const TileStore& values, std::int64_t stream, Calls calls) const {
    const auto& v = static_cast<const CudaStore&>(values);
    AttentionArgs a = calls[0].args;
    const bool any_exact = std::ranges::any_of(calls, [](const StreamCall& c) { return c.args.exact.n > 0; });
    if (a.v_is_k || &v == this) return "values within keys (MLA) are not attended to on a GPU: take the CPU's device";
    if (v.layout_.head_dim() != layout_.head_dim()) return "keys and values with heads of different sizes: take the CPU's device";
    if (any_exact && a.mask_heads > 1) return "exact windows with a mask per head: switch the windows off (sink=0,recent=0)";
    Queue& q = Queue::of(ctx, device_);
    if (q.rows_move() || std::ranges::any_of(calls, [](const StreamCall& c) { return c.args.exact.n == 0; })) q.settle();
    std::vector<std::uint64_t> numbers;
    for (const StreamCall& c : calls) numbers.push_back(c.plan);
    bool made = false;
    Queue::Step& step = q.step(numbers, [&](Queue::Step& s) {
        made = true, set_exact_rows(q, calls, s, exact_slots_), set_mask(q, calls, s, layout_.windows()),
        set_cells(q, calls, s, layout_.n_cells());
    });

    cuda::AttentionArgs c;
    c.tables = &q.tables().attention(layout_.head_dim());
    if (calls.size() > 1) {
        c.q_seq_stride = calls[1].args.q - a.q, c.out_seq_stride = calls[1].args.out - a.out;
    }
    std::vector<CodecId> formats = formats_;
    formats.insert(formats.end(), v.formats_.begin(), v.formats_.end());
    const std::vector<int> n_kv(calls.size(), a.n_kv);
    const bool has_term = std::ranges::any_of(calls, [](const StreamCall& call) { return call.queries && !call.queries->ids.empty(); });
    const cuda::AttentionShape shape{layout_.head_dim(), a.n_head, a.n_head_kv, a.n_tokens, n_kv,
                                     step.n_slots > 0,   true,     formats,     has_term};
    const bool prefill = calls.size() == 1 && cuda::takes_prefill(q.tables().device(), shape);
    const float* model_q = a.q;
    const std::size_t model_q_seq_stride = c.q_seq_stride;
    const bool same_strides =
        a.q_head_stride == static_cast<std::size_t>(layout_.head_dim()) && a.q_token_stride == a.n_head * a.q_head_stride;
    if (calls[0].queries && !set_term(q, step, calls, prefill, a, c))
        return "more than four sequences that measured offsets of their own are visible at once: give every sequence its own stream (no "
               "--kv-unified), or take the CPU's device";
    if (step.n_slots && a.q != model_q && !(same_strides && (calls.size() == 1 || model_q_seq_stride == c.q_seq_stride)))
        return "scaled keys with exact windows need queries without gaps";
    c.q = a.q, c.q_token_stride = a.q_token_stride, c.q_head_stride = a.q_head_stride;
    c.out = a.out, c.out_token_stride = a.out_token_stride, c.out_head_stride = a.out_head_stride;
    c.k = tiles(stream), c.v = v.tiles(stream);
    if (step.n_slots) {
        c.exact_k = exact_tiles(), c.exact_v = v.exact_tiles();
        c.exact_n = step.exact_n.array.as<std::int32_t>(), c.exact_q = model_q;
        c.exact_mask = step.exact_mask.as<std::uint16_t>(), c.exact_mask_token_stride = step.exact_stride;
        c.exact_mask_seq_stride = a.n_tokens * step.exact_stride;
    }
    // A mask of the step's own is of one head.
    c.mask_tiles = step.mask_tiles, c.exact_mask_tiles = step.exact_mask_tiles;
    c.exact_tiles = static_cast<int>(step.exact_stride / kTileKeys);
    c.mask = step.mask, c.mask_token_stride = step.mask_stride, c.mask_seq_stride = step.mask_seq_stride;
    if (!step.has_own_mask) c.mask_head_stride = a.mask_head_stride, c.mask_heads = a.mask_heads;
    c.scale = a.scale, c.logit_softcap = a.logit_softcap, c.max_bias = a.max_bias, c.sinks = a.sinks;

    c.codes_ready = q.codes_ready();
    const bool split = launch_attention(q, step, shape, c);
    q.codes_awaited();
    // Not before what it reads of the step is there.
    if (!made) rehearse_attention(q, shape, c, split);
    q.end_layer();
    return nullptr;
}

}  // namespace turboquant
