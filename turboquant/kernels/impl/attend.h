// Flash attention of a block of rows over a range of tiles.
#pragma once

namespace turboquant {
namespace {

struct Scratch {
    int8_t* q8;
    float* qf;
    Row* rows;
    float* l;  // [rows][kFloats]
    float *alpha, *step;
    void* scores;      // [rows][64] int32 or float
    uint8_t* weights;  // [rows][64] bytes or floats
    uint8_t *k_panel, *v_panel;
    int32_t* exact_list;
    uint8_t* residual;     // decoded rows
    float *added, *taken;  // [rows][64] each: what they add to scores, weights of their values
    TermScratch term;

    Scratch(const AttentionCall& c, uint8_t* p)
        : q8(reinterpret_cast<int8_t*>(p + c.q8)),
          qf(reinterpret_cast<float*>(p + c.qf)),
          rows(reinterpret_cast<Row*>(p + c.rows)),
          l(reinterpret_cast<float*>(rows + c.rows_per_block)),
          alpha(l + c.rows_per_block * Simd::kFloats),
          step(alpha + c.rows_per_block),
          scores(p + c.scores),
          weights(p + c.weights),
          k_panel(p + c.k_panel),
          v_panel(p + c.v_panel),
          exact_list(reinterpret_cast<int32_t*>(p + c.exact_list)),
          residual(p + c.residual),
          added(reinterpret_cast<float*>(p + c.added)),
          taken(reinterpret_cast<float*>(p + c.taken)),
          term(c, p) {}
};

static_assert(sizeof(Row) <= kRowBytes && Simd::kFloats <= static_cast<int>(kWidestVector));

struct RowPlace {
    int token, head;
};
inline RowPlace place(const AttentionCall& c, int kv_head, int row) { return {row / c.group, kv_head * c.group + row % c.group}; }

// int8 with one scale: the largest magnitude becomes 127. Returns the scale; the sum of the integers goes to `sum`.
inline float quantize_query(const float* q, int n, int8_t* q8, int* sum) {
    Simd::F top = Simd::splat(0);
    for (int i = 0; i < n; i += Simd::kFloats) top = Simd::max(top, Simd::abs(Simd::load(q + i)));
    const float max = Simd::reduce_max(top), inverse = max > 1e-30f ? 127 / max : 0;
    for (int i = 0; i < n; i += Simd::kFloats)
        Simd::store_as_bytes(reinterpret_cast<uint8_t*>(q8) + i, Simd::mul(Simd::load(q + i), Simd::splat(inverse)));
    *sum = 0;
    for (int i = 0; i < n; ++i) *sum += q8[i];
    return max / 127;
}

// Whether residuals meet the queries' integers: attend_residual.h.
inline bool integer_scores(const AttentionCall& c);

inline void load_row(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, int r) {
    const AttentionArgs& a = *c.args;
    const auto [t, h] = place(c, u.kv_head, u.row_begin + r);
    const int d = c.k->head_dim;
    const float* q = a.q + t * a.q_token_stride + h * a.q_head_stride;
    float* qf = s.qf + static_cast<size_t>(c.k->i8 && (!c.k_residual || integer_scores(c)) ? 0 : r) * d;
    if (c.k->rotated)
        rotate(*c.k, q, qf, 1, false);
    else
        memcpy(qf, q, d * sizeof(float));
    Row& row = s.rows[r];
    int sum = 0;
    const float unit = a.logit_softcap != 0 ? 1 : kLog2e;
    row.logit_scale = row.term_scale = a.scale * unit;
    if (c.k->i8) row.logit_scale *= quantize_query(qf, d, s.q8 + static_cast<size_t>(r) * d, &sum);
    row.bias = static_cast<float>(Simd::kPanelBias * sum);
    row.slope = alibi_slope(a.max_bias, a.n_head, h);
    row.m = kMinusInfinity;
    row.mask = a.mask ? a.mask + t * a.mask_token_stride + h % a.mask_heads * a.mask_head_stride : nullptr;
    row.mask_row = t * a.mask_heads + h % a.mask_heads;
    for (int i = 0; a.term.n_freq && i < a.term.n_terms; ++i)
        pad_term(s.term, a.term.q_term + ((static_cast<size_t>(i) * a.n_tokens + t) * a.n_head + h) * 2 * a.term.n_freq,
                 s.term.query + i * s.term.query_stride + static_cast<size_t>(r) * 2 * s.term.n_pad);
}

inline bool all_masked(const uint16_t* mask, int n) {
    for (int i = 0; i < n; ++i)
        if (mask[i] != kMaskHidden) return false;
    return true;
}

// A row's mask at the first cell of a tile.
inline const uint16_t* tile_mask(const AttentionArgs& a, const Row& row, int tile) {
    const int patch = a.patch.tile ? a.patch.tile[tile] : -1;
    if (patch >= 0) return a.patch.halves + (static_cast<size_t>(patch) * a.n_tokens * a.mask_heads + row.mask_row) * kTileKeys;
    return row.mask ? row.mask + static_cast<size_t>(tile) * kTileKeys : nullptr;
}

inline bool tile_masked(const AttentionArgs& a, const Scratch& s, int n_rows, int tile, int n_cells) {
    const uint16_t* last = nullptr;
    for (int r = 0; r < n_rows; ++r) {
        const uint16_t* mask = tile_mask(a, s.rows[r], tile);
        if (!mask) return false;
        if (mask != last && !all_masked(mask, n_cells)) return false;
        last = mask;
    }
    return true;
}

inline void unpack_f32(const CodecTables& t, const TileView& view, const uint8_t* tile, float* panel) {
    if (t.decode)
        t.decode(view.shape, tile, panel);
    else
        unpack_f32(t, tile, panel);
}

inline void scores(const AttentionCall& c, const Scratch& s, const Lut& lut, const uint8_t* tile, int n_rows, NextTile& next) {
    if (c.k->i8) {
        unpack_i8(*c.k, Side::key, tile, lut, s.k_panel);
        next.fetch_keys();
        multiply(KeyProductI8{s.q8, c.k->head_dim, s.k_panel, static_cast<int32_t*>(s.scores)}, n_rows, kTileKeys);
    } else {
        float* panel = reinterpret_cast<float*>(s.k_panel);
        unpack_f32(*c.k, c.args->k, tile, panel);
        multiply(ProductF32{s.qf, c.k->head_dim, panel, kTileKeys, nullptr, static_cast<float*>(s.scores)}, n_rows, kTileKeys);
    }
}

inline void softmax(const AttentionCall& c, const Scratch& s, const TileScales& scales, int n_rows, int tile, int n_cells, bool window) {
    for (int r = 0; r < n_rows; ++r) {
        RowTile io;
        io.scores = static_cast<const uint8_t*>(s.scores) + static_cast<size_t>(r) * kTileKeys * 4;
        io.term = c.args->term.n_freq ? s.term.out + r * kTileKeys : nullptr;
        io.added = window ? s.added + r * kTileKeys : nullptr;
        io.taken = window ? s.taken + r * kTileKeys : nullptr;
        io.weights_i8 = c.v->i8 ? s.weights + r * kTileKeys : nullptr;
        io.weights_f32 = c.v->i8 ? nullptr : reinterpret_cast<float*>(s.weights) + r * kTileKeys;
        io.l = s.l + r * Simd::kFloats;
        io.alpha = s.alpha + r;
        io.step = s.step + r;
        io.mask = tile_mask(*c.args, s.rows[r], tile);
        uint16_t tail[kTileKeys];
        if (n_cells < kTileKeys) {  // cells that do not exist are masked; the caller's mask may end with the last one
            for (int j = 0; j < kTileKeys; ++j) tail[j] = j >= n_cells ? kMaskHidden : io.mask ? io.mask[j] : 0;
            io.mask = tail;
        }
        softmax_row(s.rows[r], io, scales, c.k->i8, c.args->logit_softcap);
    }
}

inline void accumulate(const AttentionCall& c, const Scratch& s, const Lut& lut, const uint8_t* tile, int n_rows, float* acc,
                       NextTile& next) {
    if (c.v->i8) {
        if (c.args->v_is_k)
            transpose_i8(s.k_panel, c.dim_v, s.v_panel);
        else
            unpack_i8(*c.v, Side::value, tile, lut, s.v_panel);
        next.fetch_values();
        multiply(ValueProductI8<>{s.weights, s.v_panel, c.dim_v, s.alpha, s.step, acc}, n_rows, c.dim_v);
    } else {
        float* panel = reinterpret_cast<float*>(s.v_panel);
        if (c.args->v_is_k)
            transpose_f32(reinterpret_cast<const float*>(s.k_panel), c.dim_v, panel);
        else
            unpack_f32(*c.v, c.args->v, tile, panel);
        multiply(ProductF32{reinterpret_cast<const float*>(s.weights), kTileKeys, panel, c.dim_v, s.alpha, acc}, n_rows, c.dim_v);
    }
}

// A state begins empty; returns its accumulators.
inline float* clear_state(const AttentionCall& c, const Scratch& s, int n_rows, float* state) {
    float* acc = state + 2 * static_cast<size_t>(c.rows_per_block);
    memset(acc, 0, static_cast<size_t>(n_rows) * c.dim_v * sizeof(float));
    memset(s.l, 0, static_cast<size_t>(n_rows) * Simd::kFloats * sizeof(float));
    return acc;
}

inline void save_state(const AttentionCall& c, const Scratch& s, int n_rows, float* state) {
    for (int r = 0; r < n_rows; ++r) {
        state[r] = s.rows[r].m;
        state[c.rows_per_block + r] = Simd::reduce_add(Simd::load(s.l + r * Simd::kFloats));
    }
}

// Rows of queries over the exact rows: attend_exact.h.
inline void attend_exact(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, float* state);

// Residuals on top of a tile: attend_residual.h. Those that some row of the block wants go to s.exact_list, their number is returned; `next`
// goes on to the first one behind the tile.
inline int wanted_residuals(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, int tile, int* next);
inline void add_residual_scores(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n);
inline void add_residual_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, float* acc);

inline void attend(const AttentionCall& c, const AttentionUnit& u, uint8_t* scratch, float* state) {
    const AttentionArgs& a = *c.args;
    const Scratch s(c, scratch);
    float* acc = clear_state(c, s, u.n_rows, state);
    for (int r = 0; r < u.n_rows; ++r) load_row(c, u, s, r);

    const Lut k_lut = c.k->i8 ? load_lut(*c.k, Simd::kPanelBias) : Lut{}, v_lut = c.v->i8 ? load_lut(*c.v, 0) : Lut{};
    const Lut key_residuals = c.k_residual ? load_lut(*c.k_residual, integer_scores(c) ? Simd::kPanelBias : 0) : Lut{};
    const Lut value_residuals = c.k_residual ? load_lut(*c.v_residual, 0) : Lut{};
    TileScales scales;
    int next_residual = 0;
    for (int i = u.tile_begin; i < u.tile_end; ++i) {
        const int cell = i * kTileKeys, n_cells = a.n_kv - cell < kTileKeys ? a.n_kv - cell : kTileKeys;
        if (tile_masked(a, s, u.n_rows, i, n_cells)) continue;
        const uint8_t* k_tile = u.k_tiles + i * a.k.tile_stride;
        const uint8_t* v_tile = u.v_tiles + i * a.v.tile_stride;
        unpack_scales(*c.k, k_tile, scales.k);
        unpack_scales(*c.v, v_tile, scales.v);
        const int n_window = c.k_residual ? wanted_residuals(c, u, s, i, &next_residual) : 0;
        NextTile next(c, u, i + 1);
        next.fetch_keys();
        scores(c, s, k_lut, k_tile, u.n_rows, next);
        next.fetch_keys();
        if (a.term.n_freq) score_terms(s.term, a.term, cell, n_cells, u.n_rows, u.term_panels_built);
        next.fetch_keys();
        if (n_window) add_residual_scores(c, u, s, key_residuals, n_window);
        next.fetch_values();
        softmax(c, s, scales, u.n_rows, i, n_cells, n_window > 0);
        next.fetch_values();
        accumulate(c, s, v_lut, v_tile, u.n_rows, acc, next);
        next.fetch_values();
        if (n_window) add_residual_values(c, u, s, value_residuals, n_window, acc);
    }
    save_state(c, s, u.n_rows, state);
    if (u.exact_state) attend_exact(c, u, s, u.exact_state);
}

// Rows first..last-1 of a unit: merges the chunks' states (the usual log-sum-exp weights), takes in the sink, un-rotates.
inline void finish(const AttentionCall& c, const AttentionUnit& u, const float* states, int n_chunks, int first, int last) {
    const AttentionArgs& a = *c.args;
    alignas(64) float y[kMaxDim];
    const auto acc_of = [&](const float* state, int r) {
        return state + 2 * static_cast<size_t>(c.rows_per_block) + static_cast<size_t>(r) * c.dim_v;
    };
    const auto add = [&](const float* acc, float weight) {
        for (int j = 0; j < c.dim_v; j += Simd::kFloats)
            Simd::store(y + j, Simd::fma(Simd::splat(weight), Simd::load(acc + j), Simd::load(y + j)));
    };
    for (int r = first; r < last; ++r) {
        const auto [t, h] = place(c, u.kv_head, u.row_begin + r);
        const float sink = a.sinks ? a.sinks[h] * kLog2e : kMinusInfinity, exact = u.exact_state ? u.exact_state[r] : kMinusInfinity;
        float m = exact > sink ? exact : sink, l = 0;
        for (int i = 0; i < n_chunks; ++i) {
            const float x = states[i * c.state_floats + r];
            m = x > m ? x : m;
        }
        memset(y, 0, c.dim_v * sizeof(float));
        for (int i = 0; i < n_chunks && m > kMinusInfinity; ++i) {
            const float* state = states + i * c.state_floats;
            if (!(state[r] > kMinusInfinity)) continue;
            const float weight = exp2(state[r] - m);
            l += weight * state[c.rows_per_block + r];
            add(acc_of(state, r), weight);
        }
        if (sink > kMinusInfinity) l += exp2(sink - m);
        const float exact_weight = exact > kMinusInfinity ? exp2(exact - m) : 0;
        if (exact_weight > 0) l += exact_weight * u.exact_state[c.rows_per_block + r];
        const float norm = l > 0 ? 1 / l : 0;
        if (a.lse) a.lse[t * a.n_head + h] = l > 0 ? (m + __builtin_log2f(l)) / kLog2e : kMinusInfinity;
        float* out = a.out + t * a.out_token_stride + h * a.out_head_stride;
        if (c.v->rotated)
            rotate(*c.v, y, y, norm, true);
        else
            for (int j = 0; j < c.dim_v; ++j) y[j] *= norm;
        if (exact_weight > 0) add(acc_of(u.exact_state, r), exact_weight * norm);  // they were never rotated
        memcpy(out, y, a.v_dim_out * sizeof(float));
    }
}

}  // namespace
}  // namespace turboquant
