// Residuals on top of the cells of a tile (attention.h, ExactRowsView): rows of 4-bit codes, decoded a few at a time to int8 in the rotated
// space, where queries and accumulators are. Before the softmax they add to the scores, behind it to the accumulators, of the rows that want them.
#pragma once

namespace turboquant {
namespace {

// A residual of one head in a slot.
inline const uint8_t* residual_row(const uint8_t* base, size_t stride, int32_t slot, int head, int d) {
    return base + slot * stride + static_cast<size_t>(head) * (d / 2 + 2);
}

// Int8 levels (+ the bias of `lut`) of a row, to y; returns their scale. t, lut: of turbo4. Writes up to a vector beyond the end: a half of a
// head need not be whole vectors.
inline float decode_residual(const CodecTables& t, const Lut& lut, const uint8_t* row, uint8_t* y) {
    const int half = t.head_dim / 2;
    alignas(64) uint8_t padded[kMaxDim / 2 + Simd::kBytes];
    const uint8_t* codes = row;
    if (half % Simd::kBytes) memcpy(padded, row, half), codes = padded;
    const Simd::B table = lut.part[0];
    for (int i = 0; i < half; i += Simd::kBytes) Simd::store_bytes(y + i, Simd::lookup16(table, Simd::load_bytes(codes + i)));
    for (int i = 0; i < half; i += Simd::kBytes)
        Simd::store_bytes(y + half + i, Simd::lookup16(table, Simd::shift_right<4>(Simd::load_bytes(codes + i))));
    uint16_t scale[Simd::kFloats] = {};
    memcpy(scale, row + half, 2);
    float first[Simd::kFloats];
    Simd::store(first, Simd::load_halves(scale));
    return first[0] * t.lut_step;
}

inline void prefetch_residual(const uint8_t* row, int d) {
    for (int at = 0; at < d / 2 + 2; at += 64) __builtin_prefetch(row + at);
    __builtin_prefetch(row + d / 2 + 1);
}

inline int wanted_residuals(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, int tile, int* next) {
    const ExactRowsView& e = c.args->exact;
    int i = *next, end, n = 0;
    while (i < e.n && e.cells[i] < tile * kTileKeys) ++i;
    for (end = i; end < e.n && e.cells[end] < (tile + 1) * kTileKeys;) ++end;
    *next = end;
    for (; i < end; ++i) {
        bool wanted = !e.mask;
        for (int r = 0, last = -1; r < u.n_rows && !wanted; ++r) {
            if (s.rows[r].mask_row == last) continue;
            last = s.rows[r].mask_row;
            wanted = e.mask[static_cast<size_t>(last) * e.n + i] != kMaskHidden;
        }
        s.exact_list[n] = i;
        n += wanted;
        if (wanted) {  // scattered in memory; wanted when the tile's scores are made
            prefetch_residual(residual_row(e.k, e.k_stride, e.k_slots[i], u.kv_head, c.k->head_dim), c.k->head_dim);
            prefetch_residual(residual_row(e.v, e.v_stride, e.v_slots[i], u.kv_head, c.dim_v), c.dim_v);
        }
    }
    return n;
}

// Some rows of a side, decoded.
struct ResidualGroup {
    const int8_t* at[kResidualGroup];
    float scale[kResidualGroup];
    int slot[kResidualGroup];  // of their cells in the tile

    // Rows list[0..n).
    ResidualGroup(const CodecTables& t, const Lut& lut, const ExactRowsView& e, bool keys, int head, const int32_t* list, int n,
                  uint8_t* y) {
        for (int i = 0; i < n; ++i, y += t.head_dim) {
            const uint8_t* row = keys ? residual_row(e.k, e.k_stride, e.k_slots[list[i]], head, t.head_dim)
                                      : residual_row(e.v, e.v_stride, e.v_slots[list[i]], head, t.head_dim);
            at[i] = reinterpret_cast<const int8_t*>(y);
            scale[i] = decode_residual(t, lut, row, y);
            slot[i] = e.cells[list[i]] % kTileKeys;
        }
    }
};

// Masks of the rows of a block: where all have one, as those of a token do, every row that is wanted is wanted by all.
inline bool one_mask(const ExactRowsView& e, const Scratch& s, int n_rows) {
    for (int r = 1; r < n_rows && e.mask; ++r)
        if (s.rows[r].mask_row != s.rows[0].mask_row) return false;
    return true;
}
// Whether a row of the block wants row `i` of the call.
inline bool wants(const ExactRowsView& e, const Row& row, int i) {
    return e.mask[static_cast<size_t>(row.mask_row) * e.n + i] != kMaskHidden;
}

// Whether the queries' integers serve: a head is whole vectors.
inline bool integer_scores(const AttentionCall& c) { return c.k->i8 && c.k->head_dim % Simd::kBytes == 0; }

// dots[r][k] of R rows of int8 queries x n keys with kPanelBias.
template <int R>
inline void residual_dots(const int8_t* q8, const Row* rows, const int8_t* const* keys, int n, int d, float* dots) {
    for (int k = 0; k < n; ++k) {
        Simd::I sum[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r] = Simd::zero_ints();
        for (int i = 0; i < d; i += Simd::kBytes) {
            const Simd::B key = Simd::load_bytes(keys[k] + i);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r] = Simd::dot_key(sum[r], key, Simd::load_bytes(q8 + r * d + i));
        }
        for (int r = 0; r < R; ++r) {
            const float q_scale = rows[r].term_scale != 0 ? rows[r].logit_scale / rows[r].term_scale : 0;
            dots[r * kTileKeys + k] = q_scale * (Simd::reduce_add(Simd::to_floats(sum[r])) - rows[r].bias);
        }
    }
}

inline void residual_scores(const AttentionCall& c, const Scratch& s, int r, int n_rows, const ResidualGroup& keys, int n, float* dots) {
    const int d = c.k->head_dim;
    if (integer_scores(c)) {
        const int8_t* q8 = s.q8 + static_cast<size_t>(r) * d;
        if (n_rows == kExactRows) return residual_dots<kExactRows>(q8, s.rows + r, keys.at, n, d, dots);
        for (int i = 0; i < n_rows; ++i) residual_dots<1>(q8 + i * d, s.rows + r + i, keys.at, n, d, dots + i * kTileKeys);
        return;
    }
    const float* q[kExactRows];
    for (int i = 0; i < n_rows; ++i) q[i] = s.qf + static_cast<size_t>(r + i) * d;
    exact_scores(n_rows, q, keys.at, n, d, dots);
}

inline void add_residual_scores(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n) {
    const ExactRowsView& e = c.args->exact;
    const bool all = one_mask(e, s, u.n_rows);
    memset(s.added, 0, static_cast<size_t>(u.n_rows) * kTileKeys * sizeof(float));
    for (int first = 0; first < n; first += kResidualGroup) {
        const int m = n - first < kResidualGroup ? n - first : kResidualGroup;
        const int32_t* list = s.exact_list + first;
        const ResidualGroup keys(*c.k_residual, lut, e, true, u.kv_head, list, m, s.residual);
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            const int n_rows = u.n_rows - r < kExactRows ? u.n_rows - r : kExactRows;
            float dots[kExactRows * kTileKeys];
            residual_scores(c, s, r, n_rows, keys, m, dots);
            for (int i = 0; i < n_rows; ++i)
                for (int k = 0; k < m; ++k)
                    if (all || wants(e, s.rows[r + i], list[k]))
                        s.added[(r + i) * kTileKeys + keys.slot[k]] = keys.scale[k] * dots[i * kTileKeys + k];
        }
    }
}

inline void add_residual_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, float* acc) {
    const ExactRowsView& e = c.args->exact;
    const float ones[kExactRows] = {1, 1, 1, 1};
    const bool all = one_mask(e, s, u.n_rows);
    for (int first = 0; first < n; first += kResidualGroup) {
        const int m = n - first < kResidualGroup ? n - first : kResidualGroup;
        const int32_t* list = s.exact_list + first;
        const ResidualGroup values(*c.v_residual, lut, e, false, u.kv_head, list, m, s.residual);
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            const int n_rows = u.n_rows - r < kExactRows ? u.n_rows - r : kExactRows;
            float weights[kExactRows * kTileKeys];
            for (int i = 0; i < n_rows; ++i)
                for (int k = 0; k < m; ++k)
                    weights[i * kTileKeys + k] =
                        all || wants(e, s.rows[r + i], list[k]) ? values.scale[k] * s.taken[(r + i) * kTileKeys + values.slot[k]] : 0;
            exact_values(n_rows, weights, values.at, m, ones, acc + static_cast<size_t>(r) * c.dim_v, c.dim_v);
        }
    }
}

}  // namespace
}  // namespace turboquant
