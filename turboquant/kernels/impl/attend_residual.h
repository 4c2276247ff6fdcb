// Residuals on top of the cells of a tile (attention.h, ExactRowsView): rows of 4-bit codes, decoded a few at a time in the rotated space,
// where queries and accumulators are. Before the softmax they add to the scores, behind it to the accumulators, of the rows that want them.
#pragma once

namespace turboquant {
namespace {

// A residual of one head in a slot.
inline const uint8_t* residual_row(const uint8_t* base, size_t stride, int32_t slot, int head, int d) {
    return base + slot * stride + static_cast<size_t>(head) * (d / 2 + 2);
}

// Levels of a row; returns their scale. t: the tables of turbo4. Writes up to a vector beyond the end: a half of a head need not be whole vectors.
inline float decode_residual(const CodecTables& t, const uint8_t* row, float* y) {
    constexpr int kPad = 64;
    alignas(64) uint8_t bytes[kMaxDim / 2 + kPad], codes[2][kMaxDim / 2 + kPad];
    const int half = t.head_dim / 2;
    memcpy(bytes, row, half);
    for (int i = 0; i < half; i += Simd::kBytes) {
        const Simd::B v = Simd::load_bytes(bytes + i);
        Simd::store_bytes(codes[0] + i, Simd::and_bytes(v, 15));
        Simd::store_bytes(codes[1] + i, Simd::and_bytes(Simd::shift_right<4>(v), 15));
    }
    uint16_t scale[Simd::kFloats] = {};
    memcpy(scale, row + half, 2);
    float first[Simd::kFloats];
    Simd::store(first, Simd::load_halves(scale));
    for (int h = 0; h < 2; ++h)
        for (int i = 0; i < half; i += Simd::kFloats) Simd::store(y + h * half + i, Simd::lookup_floats<4>(t.centroids, codes[h] + i));
    return first[0];
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
    }
    return n;
}

// Some rows of a side, decoded.
struct ResidualGroup {
    const float* at[kResidualGroup];
    float scale[kResidualGroup];
    int slot[kResidualGroup];  // of their cells in the tile

    // Rows list[0..n).
    ResidualGroup(const CodecTables& t, const ExactRowsView& e, bool keys, int head, const int32_t* list, int n, float* y) {
        for (int i = 0; i < n; ++i, y += t.head_dim) {
            const uint8_t* row = keys ? residual_row(e.k, e.k_stride, e.k_slots[list[i]], head, t.head_dim)
                                      : residual_row(e.v, e.v_stride, e.v_slots[list[i]], head, t.head_dim);
            at[i] = y;
            scale[i] = decode_residual(t, row, y);
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

inline void add_residual_scores(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, int n) {
    const ExactRowsView& e = c.args->exact;
    const int d = c.k->head_dim;
    const bool all = one_mask(e, s, u.n_rows);
    memset(s.added, 0, static_cast<size_t>(u.n_rows) * kTileKeys * sizeof(float));
    for (int first = 0; first < n; first += kResidualGroup) {
        const int m = n - first < kResidualGroup ? n - first : kResidualGroup;
        const int32_t* list = s.exact_list + first;
        const ResidualGroup keys(*c.k_residual, e, true, u.kv_head, list, m, s.residual);
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            const int n_rows = u.n_rows - r < kExactRows ? u.n_rows - r : kExactRows;
            const float* q[kExactRows];
            float dots[kExactRows * kTileKeys];
            for (int i = 0; i < n_rows; ++i) q[i] = s.qf + static_cast<size_t>(r + i) * d;
            exact_scores(n_rows, q, keys.at, m, d, dots);
            for (int i = 0; i < n_rows; ++i)
                for (int k = 0; k < m; ++k)
                    if (all || wants(e, s.rows[r + i], list[k]))
                        s.added[(r + i) * kTileKeys + keys.slot[k]] = keys.scale[k] * dots[i * kTileKeys + k];
        }
    }
}

inline void add_residual_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, int n, float* acc) {
    const ExactRowsView& e = c.args->exact;
    const float ones[kExactRows] = {1, 1, 1, 1};
    const bool all = one_mask(e, s, u.n_rows);
    for (int first = 0; first < n; first += kResidualGroup) {
        const int m = n - first < kResidualGroup ? n - first : kResidualGroup;
        const int32_t* list = s.exact_list + first;
        const ResidualGroup values(*c.v_residual, e, false, u.kv_head, list, m, s.residual);
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
