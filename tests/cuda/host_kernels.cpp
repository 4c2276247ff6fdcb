// The kernels of turboquant/cuda as the specification has them, in host memory: what is above them is tested without a GPU. Linked in
// place of the library turboquant_cuda.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "tests/cuda/host_streams.h"
#include "turboquant/attention/attention.h"
#include "turboquant/attention/turns.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/impl/masks.h"
#include "turboquant/cuda/impl/step.h"

namespace turboquant::cuda {

struct HeadFormat {
    CodecId codec;
    std::size_t at, row_at;
};

std::size_t encode_plan_bytes(const TileView&, int n_head) { return n_head * sizeof(HeadFormat); }
Status plan_encode(const TileView& view, int n_head, NormMode norm_mode, const Device&, void* memory, Stream, EncodePlan& plan) {
    plan = {};
    plan.side = view.shape.side, plan.head_dim = view.shape.head_dim, plan.n_head = n_head, plan.norm_mode = norm_mode;
    plan.tiles = const_cast<std::uint8_t*>(view.tiles), plan.tile_stride = view.tile_stride;
    auto* heads = static_cast<HeadFormat*>(memory);
    for (int h = 0; h < n_head; ++h) {
        const CodecId codec = view.heads ? view.heads[h].codec : view.shape.codec;
        heads[h] = {codec, view.heads ? view.heads[h].at : h * view.head_stride, plan.row_bytes};
        plan.row_bytes += row_bytes(codec, plan.head_dim);
    }
    plan.heads = heads;
    return {};
}

namespace {

TileShape shape_of(const EncodePlan& plan, int h) { return {plan.heads[h].codec, plan.side, plan.head_dim, 0}; }
std::uint8_t* tile_of(const EncodePlan& plan, int h, std::int64_t cell) {
    return plan.tiles + plan.heads[h].at + cell / kTileKeys * plan.tile_stride;
}

/// Decoded, in the model's space.
std::vector<float> decoded(const EncodePlan& plan, int h, std::int64_t cell) {
    const TileShape shape = shape_of(plan, h);
    const auto d = static_cast<std::size_t>(plan.head_dim);
    std::vector<std::uint8_t> row(row_bytes(shape.codec, plan.head_dim)), tile(tile_bytes(shape));
    fragment_get_row(shape, tile_of(plan, h, cell), static_cast<int>(cell % kTileKeys), row.data());
    tile_set_row(shape, tile.data(), 0, row.data());
    std::vector<float> x(d);
    tile_decode_rotated(shape, tile.data(), 0, x);
    if (codec_info(shape.codec).rotated) rotation_for(plan.head_dim).inverse(x);
    return x;
}

/// move(shape, tile, slot, row) for every head of every cell.
template <class Byte, class Move>
Status move_rows(const EncodePlan& plan, const std::int64_t* cells, int n, Byte* rows, std::size_t row_stride, Move&& move) {
    for (int i = 0; i < n; ++i)
        for (int h = 0; h < plan.n_head; ++h)
            move(shape_of(plan, h), tile_of(plan, h, cells[i]), static_cast<int>(cells[i] % kTileKeys),
                 rows + i * row_stride + plan.heads[h].row_at);
    return {};
}

}  // namespace

namespace {

/// Whether what another stream made is there: what a model's operations made, for these kernels.
Status is_made(const void* at, Stream stream) {
    if (!stream || static_cast<test::HostStream*>(stream)->may_read(at)) return {};
    return bad_argument("host kernels: what another stream makes is read without a wait");
}

}  // namespace

Status encode(const EncodePlan& plan, const EncodeArgs& a, Stream stream) {
    if (const Status status = is_made(a.x, stream); !status.ok()) return status;
    // Of fewer rows nobody reads the codes before the next graph, where all see them exactly.
    constexpr int kSeenExactly = 32;
    if (stream && a.n > kSeenExactly) static_cast<test::HostStream*>(stream)->writes(plan.tiles);
    const int d = plan.head_dim;
    for (int i = 0; i < a.n; ++i) {
        if (a.cells[i] < 0) continue;
        for (int h = 0; h < plan.n_head; ++h) {
            const std::size_t at = i * a.token_stride + h * a.head_stride;
            std::vector<float> x(d);
            for (int k = 0; k < d; ++k)
                x[k] = a.x_is_half ? from_half(static_cast<const std::uint16_t*>(a.x)[at + k]) : static_cast<const float*>(a.x)[at + k];
            for (int k = 0; a.scales && k < d; ++k) x[k] *= a.scales[h * d + k];
            if (a.turns && a.offset_ids[i] >= 0)
                for (int k = 0; k < d; ++k)
                    x[k] -= turned(a.offsets + a.offset_ids[i] * a.offset_stride + h * 2 * d, a.turns + i * 2 * d, d, k);
            if (!std::ranges::all_of(x, [](float f) { return std::isfinite(f); })) std::ranges::fill(x, 0.0f), *a.not_finite = 1;
            const TileShape shape = shape_of(plan, h);
            std::vector<std::uint8_t> tile(tile_bytes(shape)), row(row_bytes(shape.codec, d));
            tile_encode(shape, tile.data(), 0, x, plan.norm_mode);
            tile_get_row(shape, tile.data(), 0, row.data());
            fragment_set_row(shape, tile_of(plan, h, a.cells[i]), static_cast<int>(a.cells[i] % kTileKeys), row.data());
        }
    }
    return {};
}

Status encode_together(std::span<const EncodeJob> jobs, Stream stream) {
    for (const EncodeJob& j : jobs)
        if (const Status status = encode(j.plan, j.args, stream); !status.ok()) return status;
    return {};
}

Status get_rows(const EncodePlan& plan, const std::int64_t* cells, int n, std::uint8_t* rows, std::size_t row_stride, Stream) {
    return move_rows(plan, cells, n, rows, row_stride, fragment_get_row);
}
Status set_rows(const EncodePlan& plan, const std::int64_t* cells, int n, const std::uint8_t* rows, std::size_t row_stride, Stream) {
    return move_rows(plan, cells, n, rows, row_stride, fragment_set_row);
}

Status decode_rows(const EncodePlan& plan, const DecodeArgs& a, Stream) {
    for (int i = 0; i < a.n; ++i)
        for (int h = 0; h < plan.n_head; ++h) {
            std::vector<float> x = decoded(plan, h, a.cells[i]);
            if (a.shift_turns) {
                const float *c = a.shift_turns + i * 2 * plan.head_dim, *s = c + plan.head_dim;
                for (int p = 0; p < a.rope.n_dims / 2; ++p) {
                    const int k = a.rope.n_offset + (a.rope.adjacent ? 2 * p : p), l = k + (a.rope.adjacent ? 1 : a.rope.n_dims / 2);
                    const float v = x[k], w = x[l];
                    x[k] = v * c[k] - w * s[k], x[l] = w * c[l] + v * s[l];
                }
            }
            std::ranges::copy(x, static_cast<float*>(a.out) + i * a.token_stride + h * a.head_stride);
        }
    return {};
}

Status spread_turns(const float* digits, int n_freq, const RopeLayout& rope, int head_dim, const std::int32_t* positions, int n, float* out,
                    Stream) {
    std::vector<float> row(2 * turn_width(n_freq));
    for (int i = 0; i < n; ++i, out += 2 * head_dim) {
        std::fill_n(out, head_dim, 1.0f), std::fill_n(out + head_dim, head_dim, 0.0f);
        turn_row(digits, n_freq, positions[i], row.data());
        for (int d = 0; d < rope.n_dims; ++d) {
            const int f = rope.adjacent ? d / 2 : d % (rope.n_dims / 2);
            out[rope.n_offset + d] = row[f], out[head_dim + rope.n_offset + d] = row[turn_width(n_freq) + f];
        }
    }
    return {};
}

Status copy_tiles(void* dst, const void* src, std::size_t bytes, Stream) { return std::memcpy(dst, src, bytes), Status{}; }
Status clear_tiles(void* tiles, std::size_t bytes, Stream) { return std::memset(tiles, 0, bytes), Status{}; }

Status keep_rows(const KeepRows& a, Stream stream, const KeepRows* also) {
    if (also)
        if (const Status status = keep_rows(*also, stream, nullptr); !status.ok()) return status;
    if (const Status status = is_made(a.x, stream); !status.ok()) return status;
    for (int i = 0; i < a.n; ++i)
        for (int h = 0; h < a.n_head; ++h) {
            std::vector<float> kept(a.head_dim), signed_kept(a.head_dim);
            for (int j = 0; j < a.head_dim; ++j) kept[j] = kept_value(a, i, h * a.head_dim + j);
            for (int j = 0; j < a.head_dim; ++j) signed_kept[j] = a.signs ? kept[j] * a.signs[j] : 0;
            for (int j = 0; j < a.head_dim; ++j) keep_value(a, i, h, j, kept.data(), signed_kept.data());
        }
    return {};
}
Status measure_mean(const MeasureMean& a, Stream) {
    for (int h = 0; h < a.n_head; ++h) {
        for (int i = 0; i < a.head_dim; ++i) mean_value(a, h, i);
        a.done[h] = a.number;
    }
    return {};
}
Status move_rows(std::uint16_t* halves, std::size_t n_embd, const std::int64_t* from, const std::int64_t* to, int n, Stream) {
    for (int i = 0; i < n; ++i) std::copy_n(halves + from[i] * n_embd, n_embd, halves + to[i] * n_embd);
    return {};
}
Status transform_queries(const TransformQueries& a, Stream) {
    for (int t = 0; t < a.n_seq * a.n_tokens; ++t)
        for (int h = 0; h < a.n_head; ++h) {
            for (int i = 0; a.scales && i < a.head_dim; ++i) scale_query_value(a, t, h, i);
            for (int k = 0; k < a.n_terms; ++k)
                for (int i = 0; i < a.n_freq; ++i) query_term(a, k, t, h, i);
        }
    return {};
}
Status see_cells(const SeeCells& a, Stream stream) {
    if (stream && static_cast<test::HostStream*>(stream)->has_work())
        return bad_argument("host kernels: the host waits for more than the cells that are seen");
    std::fill_n(a.seen, (a.n_kv + 63) / 64, std::uint64_t{0});
    for (int t = 0; t < a.n_tokens; ++t)
        for (int j = 0; j < a.n_kv; ++j)
            if (a.mask[t * a.token_stride + j] != kMaskHidden) a.seen[j / 64] |= std::uint64_t{1} << j % 64;
    return {};
}
Status window_masks(const WindowMasks& a, Stream) {
    for (int row = 0; row < a.n_seq * a.n_tokens; ++row) {
        std::int32_t own = -1;
        for (int s = 0; s < a.n_slots; ++s) own = std::max(own, seen_position(a, row, s));
        for (std::size_t j = 0; j < a.out_stride; ++j) a.out[row * a.out_stride + j] = cell_value(a, row, static_cast<int>(j));
        for (int s = 0; s < a.n_slots; ++s) take_slot(a, row, own, s);
    }
    return {};
}
std::size_t attention_table_bytes(int) { return 256; }
Status upload_attention_tables(AttentionTables& tables, int head_dim, void*, Stream) { return tables.head_dim = head_dim, Status{}; }
int format_index(CodecId codec) { return fragment_codec_index(codec); }
/// The reference takes the table that the CPU has.
std::vector<float> make_term_turns(std::span<const double> frequencies, int) { return make_turns(frequencies); }
std::vector<std::uint32_t> make_term_panel(std::span<const double>) { return {0}; }
Status summarize_mask(const MaskTiles&, Stream) { return {}; }
Status summarize_positions(const Term&, int, int, const std::int32_t*, std::int32_t*, Stream) { return {}; }

bool takes_prefill(const Device&, const AttentionShape& s) { return s.n_tokens > 20; }
Status plan_attention(const Device& device, const AttentionShape& s, AttentionPlan& p) {
    p = {};
    p.head_dim = s.head_dim, p.n_head = s.n_head, p.n_head_kv = s.n_head_kv, p.n_tokens = s.n_tokens;
    p.n_seq = static_cast<int>(s.n_kv.size()), p.n_kv = s.n_kv[0], p.exact_windows = s.exact_windows, p.workspace_bytes = 256;
    p.prefill.n_splits = takes_prefill(device, s);
    return {};
}
Status prepare_workspace(const AttentionPlan&, void*, Stream) { return {}; }

namespace {

/// Tiles in the CPU's order.
struct HostTiles {
    std::vector<std::uint8_t> bytes;
    std::vector<HeadTiles> heads;
    TileView view;

    HostTiles(const Tiles& t, Side side, int d, int n_head, int n_kv) {
        std::size_t stride = 0;
        for (int h = 0; h < n_head; ++h) {
            heads.push_back({t.head_format ? kFragmentCodecs[t.head_format[h]] : t.codec, stride});
            stride += tile_bytes({heads[h].codec, side, d, 0});
        }
        bytes.resize(stride * (n_kv / kTileKeys + 1));
        for (int h = 0; h < n_head; ++h) {
            const TileShape shape{heads[h].codec, side, d, 0};
            std::vector<std::uint8_t> row(row_bytes(shape.codec, d));
            for (int j = 0; j < n_kv; ++j) {
                const std::uint8_t* from = t.tiles + (t.head_at ? t.head_at[h] : h * t.head_stride) + j / kTileKeys * t.tile_stride;
                fragment_get_row(shape, from, j % kTileKeys, row.data());
                tile_set_row(shape, bytes.data() + heads[h].at + j / kTileKeys * stride, j % kTileKeys, row.data());
            }
        }
        view = {{heads[0].codec, side, d, 0}, bytes.data(), tile_bytes({heads[0].codec, side, d, 0}), stride, heads.data()};
    }
};

/// Exact rows as the model made them.
std::vector<std::uint16_t> exact_rows(const Tiles& t, const HostTiles& of, Side side, int d, int n_head, int n) {
    const HostTiles tiles(t, side, d, n_head, n);
    std::vector<std::uint16_t> rows;
    std::vector<float> x(d);
    for (int i = 0; i < n; ++i)
        for (int h = 0; h < n_head; ++h) {
            const TileShape raw{CodecId::raw, side, d, 0};
            tile_decode_rotated(raw, tiles.bytes.data() + tiles.heads[h].at + i / kTileKeys * tiles.view.tile_stride, i % kTileKeys, x);
            if (codec_info(of.heads[h].codec).rotated) rotation_for(d).inverse(x);
            for (const float f : x) rows.push_back(to_half(f));
        }
    return rows;
}

}  // namespace

Status run_attention(const AttentionPlan& p, const AttentionArgs& all, void*, Stream stream) {
    if (const Status status = is_made(all.q, stream); !status.ok()) return status;
    for (const Tiles* t : {&all.k, &all.v})
        if (stream && !static_cast<test::HostStream*>(stream)->may_read(t->tiles, static_cast<test::HostEvent*>(all.codes_ready)))
            return bad_argument("host kernels: attention reads codes that another stream may still be writing");
    if (p.n_seq > 1) {
        AttentionPlan one = p;
        one.n_seq = 1;
        for (int s = 0; s < p.n_seq; ++s) {
            AttentionArgs a = all;
            a.q += s * a.q_seq_stride, a.out += s * a.out_seq_stride, a.k.tiles += s * a.k.seq_stride, a.v.tiles += s * a.v.seq_stride;
            if (a.exact_q) a.exact_q += s * a.q_seq_stride;
            if (a.seq_n_kv) a.seq_n_kv += s;
            if (a.exact_n) a.exact_n += s, a.exact_mask += s * a.exact_mask_seq_stride;
            if (a.exact_n) a.exact_k.tiles += s * a.exact_k.seq_stride, a.exact_v.tiles += s * a.exact_v.seq_stride;
            if (a.mask) a.mask += s * a.mask_seq_stride;
            if (a.lse) a.lse += s * p.n_tokens * p.n_head;
            if (a.term.n_freq && a.term.q_term) a.term.q_term += s * a.term.q_seq_stride;
            if (a.term.n_freq && a.term.ids) a.term.ids += s * a.term.n_terms;
            if (a.term.n_freq) a.term.cell_pos += s * a.term.cell_seq_stride;
            if (a.term.n_freq && a.term.cell_term) a.term.cell_term += s * a.term.cell_seq_stride;
            if (const Status status = run_attention(one, a, nullptr, stream); !status.ok()) return status;
        }
        return {};
    }
    const AttentionArgs& a = all;
    const int d = p.head_dim, n_kv = a.seq_n_kv ? a.seq_n_kv[0] : p.n_kv;
    const HostTiles k(a.k, Side::key, d, p.n_head_kv, n_kv), v(a.v, Side::value, d, p.n_head_kv, n_kv);
    turboquant::AttentionArgs c;
    c.n_head = p.n_head, c.n_head_kv = p.n_head_kv, c.n_tokens = p.n_tokens, c.n_kv = std::max(n_kv, 1);
    c.q = a.q, c.q_token_stride = a.q_token_stride, c.q_head_stride = a.q_head_stride;
    c.out = a.out, c.out_token_stride = a.out_token_stride, c.out_head_stride = a.out_head_stride;
    c.k = k.view, c.v = v.view, c.v_dim_out = d;
    const std::vector<std::uint16_t> hidden(p.n_tokens, kMaskHidden);
    if (n_kv == 0)
        c.mask = hidden.data(), c.mask_token_stride = 1;
    else
        c.mask = a.mask, c.mask_token_stride = a.mask_token_stride, c.mask_head_stride = a.mask_head_stride, c.mask_heads = a.mask_heads;
    c.scale = a.scale, c.logit_softcap = a.logit_softcap, c.max_bias = a.max_bias, c.sinks = a.sinks, c.lse = a.lse;
    std::vector<float> q_term;
    if (a.term.n_freq && !a.term.q_term) {
        TransformQueries t;
        t.q = a.q, t.token_stride = a.q_token_stride, t.head_stride = a.q_head_stride;
        t.n_tokens = p.n_tokens, t.n_head = p.n_head, t.n_head_kv = p.n_head_kv, t.head_dim = d;
        t.mu = a.term.mu, t.mu_stride = a.term.mu_stride, t.ids = a.term.ids, t.n_terms = a.term.n_terms;
        t.n_freq = a.term.n_freq, t.rope = a.term.rope;
        q_term.resize(static_cast<std::size_t>(t.n_terms) * t.n_tokens * t.n_head * 2 * t.n_freq), t.terms = q_term.data();
        if (const Status status = transform_queries(t, stream); !status.ok()) return status;
    }
    if (a.term.n_freq)
        c.term = {a.term.n_freq,   q_term.empty() ? a.term.q_term : q_term.data(), a.term.turns, a.term.cell_pos, a.term.n_terms,
                  a.term.cell_term};
    std::vector<std::uint16_t> exact_k, exact_v, exact_mask;
    std::vector<std::int32_t> slots;
    if (p.exact_windows) {
        const int n = a.exact_n[0];
        exact_k = exact_rows(a.exact_k, k, Side::key, d, p.n_head_kv, n),
        exact_v = exact_rows(a.exact_v, v, Side::value, d, p.n_head_kv, n);
        for (int i = 0; i < n; ++i) slots.push_back(i);
        for (int t = 0; t < p.n_tokens; ++t)
            exact_mask.insert(exact_mask.end(), a.exact_mask + t * a.exact_mask_token_stride,
                              a.exact_mask + t * a.exact_mask_token_stride + n);
        c.exact.n = n, c.exact.k = reinterpret_cast<const std::uint8_t*>(exact_k.data());
        c.exact.v = reinterpret_cast<const std::uint8_t*>(exact_v.data()),
        c.exact.k_stride = c.exact.v_stride = 2 * static_cast<std::size_t>(d) * p.n_head_kv;
        c.exact.k_slots = c.exact.v_slots = slots.data(), c.exact.mask = exact_mask.data();
        c.exact.q = a.exact_q ? a.exact_q : a.q, c.exact.q_token_stride = a.q_token_stride, c.exact.q_head_stride = a.q_head_stride;
        if (c.mask_heads > 1) return bad_argument("host kernels: exact rows with a mask per head");
    }
    if (const char* error = check_attention_args(c)) return bad_argument(error);
    reference_attention(c);
    if (stream) static_cast<test::HostStream*>(stream)->writes(a.out);
    return {};
}

bool can_split(const AttentionPlan& p, const AttentionArgs& a, const KeepRows& keys, const KeepRows& values) {
    return p.exact_windows && a.exact_mask && keys.slots && values.slots && keys.n == values.n;
}
namespace {

/// The result of a call's first launch, by where the second will put its own.
thread_local std::map<const float*, std::vector<float>> before_rows;

std::size_t out_size(const AttentionPlan& p, const AttentionArgs& a) {
    return (p.n_seq - 1) * a.out_seq_stride + (p.n_tokens - 1) * a.out_token_stride + (p.n_head - 1) * a.out_head_stride + p.head_dim;
}

/// Whether rows that were kept are still where the model made them.
bool are_there(const KeepRows& r) {
    const std::size_t n = static_cast<std::size_t>(r.n_head) * r.head_dim;
    for (int i = 0; i < r.n; ++i)
        for (std::size_t d = 0; d < n; ++d) {
            const float x = r.x[i * r.stride + d];
            if (!(std::abs(from_half(r.halves[r.slots[i] * n + d]) - x) <= 1e-2f * std::abs(x) + 1e-3f)) return false;
        }
    return true;
}

}  // namespace

/// All is in the second launch, which sees whether what the first one read is still the same.
Status run_before_rows(const AttentionPlan& p, const AttentionArgs& a, void* workspace, Stream stream) {
    if (const Status status = run_attention(p, a, workspace, stream); !status.ok()) return status;
    before_rows[a.out].assign(a.out, a.out + out_size(p, a));
    return {};
}
Status run_with_rows(const AttentionPlan& p, const AttentionArgs& all, const NewRows& rows, void* workspace, Stream stream) {
    const auto first = before_rows.extract(all.out);
    if (first.empty()) return bad_argument("host kernels: rows of a step without the attention before");
    if (const Status status = run_attention(p, all, workspace, stream); !status.ok()) return status;
    if (std::memcmp(first.mapped().data(), all.out, first.mapped().size() * sizeof(float)) != 0)
        return bad_argument("host kernels: attention before a step's rows read what was not there yet");
    if (rows.keep)
        if (const Status status = keep_rows(rows.keys, stream, &rows.values); !status.ok()) return status;
    if (!are_there(rows.keys) || !are_there(rows.values))
        return bad_argument("host kernels: rows of a step are not what they were when they were kept");
    AttentionArgs a = all;
    const std::size_t stride = a.exact_mask_token_stride;
    std::vector<std::uint16_t> mask(a.exact_mask, a.exact_mask + p.n_seq * p.n_tokens * stride);
    for (int t = 0; t < p.n_seq * p.n_tokens; ++t)
        for (int i = 0; i < rows.keys.n; ++i) mask[t * stride + rows.keys.slots[i]] = rows.mask[t * rows.keys.n + i];
    a.exact_mask = mask.data();
    return run_attention(p, a, workspace, stream);
}

}  // namespace turboquant::cuda
