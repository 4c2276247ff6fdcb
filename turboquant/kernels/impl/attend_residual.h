// Residuals on top of the cells of a tile (attention.h, ExactRowsView): rows of 4-bit codes, decoded a few at a time to int8 in the rotated
// space, where queries and accumulators are. Before the softmax they add to the scores, behind it to the accumulators, of the rows that want them.
#pragma once

namespace turboquant {
namespace {

// A residual of one head, of row i of the call.
inline const uint8_t* key_residual(const ExactRowsView& e, int head, int i) {
    return e.k + e.k_slots[i] * e.k_stride + head * e.k_head_stride;
}
inline const uint8_t* value_residual(const ExactRowsView& e, int head, int i) {
    return e.v + e.v_slots[i] * e.v_stride + head * e.v_head_stride;
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

// Rows of a window mostly lie one after the other: what is missing here the next one brings.
inline void prefetch_residual(const uint8_t* row, int d) {
    for (int at = 0; at < d / 2 + 2; at += 64) __builtin_prefetch(row + at);
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
        if (wanted) {
            prefetch_residual(key_residual(e, u.kv_head, i), c.k->head_dim);
            prefetch_residual(value_residual(e, u.kv_head, i), c.dim_v);
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
            const uint8_t* row = keys ? key_residual(e, head, list[i]) : value_residual(e, head, list[i]);
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

// Whether integers serve: the queries' own, and weights of 8 bits for values; a head is whole vectors.
inline bool integer_scores(const AttentionCall& c) { return c.k->i8 && c.k->head_dim % Simd::kBytes == 0; }
inline bool integer_values(const AttentionCall& c) { return c.v->i8 && c.dim_v % Simd::kBytes == 0; }

// Scales of a tile's residuals by slot, 0 where there is none: those of all that some row wants, and of those that one row does.
struct ResidualScales {
    alignas(64) float all[kTileKeys] = {};
    alignas(64) float wanted[kTileKeys];
    int wanted_by = -1;  // mask row

    const float* of(const ExactRowsView& e, const Row& row, bool every, const int32_t* list, int n) {
        if (every) return all;
        if (row.mask_row == wanted_by) return wanted;
        wanted_by = row.mask_row;
        memset(wanted, 0, sizeof(wanted));
        for (int i = 0; i < n; ++i)
            if (wants(e, row, list[i])) wanted[e.cells[list[i]] % kTileKeys] = all[e.cells[list[i]] % kTileKeys];
        return wanted;
    }
};

// Decodes the rows of list[0..n) to y and gives them to `take` in groups of G adjacent slots, by the first: row i of a group lies at y + i * d.
// What lies in the place of a slot that has none is never seen: its scale is 0.
template <int G, class Take>
inline void each_residual_group(const CodecTables& t, const Lut& lut, const ExactRowsView& e, bool keys, int head, const int32_t* list,
                                int n, uint8_t* y, float* scale, const Take& take) {
    static_assert(G <= kResidualGroup && kTileKeys % G == 0);
    const int d = t.head_dim;
    for (int i = 0; i < n;) {
        const int first = e.cells[list[i]] % kTileKeys / G * G;
        for (; i < n; ++i) {
            const int slot = e.cells[list[i]] % kTileKeys;
            if (slot >= first + G) break;
            const uint8_t* row = keys ? key_residual(e, head, list[i]) : value_residual(e, head, list[i]);
            scale[slot] = decode_residual(t, lut, row, y + (slot - first) * d);
        }
        take(first);
    }
}

constexpr int kFewRows = 8;  // more are worth a panel

// With few rows: dot products of 4 rows with as many keys as fill a vector with their sums.
constexpr int kDotKeys = Simd::kFloats / kExactRows;
static_assert(kExactRows == 4);

struct DotRows {
    const int8_t* q[kExactRows];
    float scale[Simd::kFloats], bias[Simd::kFloats];  // of row i / kDotKeys

    DotRows(const AttentionCall& c, const Scratch& s, int first, int n_rows) {
        for (int i = 0; i < kExactRows; ++i) {
            const int row = first + i < n_rows ? first + i : 0;  // those beyond the end are not stored
            q[i] = s.q8 + static_cast<size_t>(row) * c.k->head_dim;
            for (int k = 0; k < kDotKeys; ++k) {
                scale[i * kDotKeys + k] = query_scale(s.rows[row]);
                bias[i * kDotKeys + k] = s.rows[row].bias;
            }
        }
    }
    // Of a query's integers; the softmax takes what is added times term_scale.
    static float query_scale(const Row& row) { return row.term_scale != 0 ? row.logit_scale / row.term_scale : 0; }
};

// dots[i * kDotKeys + k] of row i and the key (with kPanelBias) at y + k * d.
inline void residual_dots(const DotRows& rows, const uint8_t* y, int d, float* dots) {
    Simd::I sum[Simd::kFloats];
#pragma GCC unroll 16
    for (int i = 0; i < Simd::kFloats; ++i) sum[i] = Simd::zero_ints();
    for (int at = 0; at < d; at += Simd::kBytes) {
        Simd::B key[kDotKeys];
#pragma GCC unroll 4
        for (int k = 0; k < kDotKeys; ++k) key[k] = Simd::load_bytes(y + k * d + at);
#pragma GCC unroll 4
        for (int i = 0; i < kExactRows; ++i) {
            const Simd::B q = Simd::load_bytes(rows.q[i] + at);
#pragma GCC unroll 4
            for (int k = 0; k < kDotKeys; ++k) sum[i * kDotKeys + k] = Simd::dot_key(sum[i * kDotKeys + k], key[k], q);
        }
    }
    const Simd::F x = Simd::sub(Simd::to_floats(Simd::sums(sum)), Simd::load(rows.bias));
    Simd::store(dots, Simd::mul(x, Simd::load(rows.scale)));
}

inline void add_scores_of_few_rows(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, bool every) {
    const ExactRowsView& e = c.args->exact;
    const int d = c.k->head_dim;
    const DotRows rows[kFewRows / kExactRows] = {{c, s, 0, u.n_rows}, {c, s, kExactRows, u.n_rows}};
    ResidualScales scales;
    memset(s.added, 0, static_cast<size_t>(u.n_rows) * kTileKeys * sizeof(float));
    each_residual_group<kDotKeys>(*c.k_residual, lut, e, true, u.kv_head, s.exact_list, n, s.residual, scales.all, [&](int first) {
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            float dots[Simd::kFloats];
            residual_dots(rows[r / kExactRows], s.residual, d, dots);
            for (int i = 0; i < kExactRows && r + i < u.n_rows; ++i)
                memcpy(s.added + (r + i) * kTileKeys + first, dots + i * kDotKeys, kDotKeys * sizeof(float));
        }
    });
    for (int r = 0; r < u.n_rows; ++r) {
        const float* scale = scales.of(e, s.rows[r], every, s.exact_list, n);
        float* x = s.added + r * kTileKeys;
        for (int j = 0; j < kTileKeys; j += Simd::kFloats) Simd::store(x + j, Simd::mul(Simd::load(x + j), Simd::load(scale + j)));
    }
}

// With many: the product that a tile's keys go through, in the place of their panel; of the values', which is not made yet, where that is made of
// the keys'.
inline void add_scores_of_many_rows(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, bool every) {
    const ExactRowsView& e = c.args->exact;
    const int d = c.k->head_dim;
    uint8_t* panel = c.args->v_is_k ? s.v_panel : s.k_panel;
    ResidualScales scales;
    each_residual_group<1>(*c.k_residual, lut, e, true, u.kv_head, s.exact_list, n, s.residual, scales.all, [&](int slot) {
        for (int i = 0; i < d; i += 4) memcpy(panel + i * kTileKeys + 4 * slot, s.residual + i, 4);
    });
    int32_t* sums = reinterpret_cast<int32_t*>(s.added);  // become floats where they lie
    multiply(KeyProductI8{s.q8, d, panel, sums}, u.n_rows, kTileKeys);
    for (int r = 0; r < u.n_rows; ++r) {
        const float* scale = scales.of(e, s.rows[r], every, s.exact_list, n);
        const Simd::F bias = Simd::splat(s.rows[r].bias), q_scale = Simd::splat(DotRows::query_scale(s.rows[r]));
        for (int j = r * kTileKeys; j < (r + 1) * kTileKeys; j += Simd::kFloats, scale += Simd::kFloats) {
            const Simd::F x = Simd::mul(Simd::sub(Simd::load_ints(sums + j), bias), q_scale);
            Simd::store(s.added + j, Simd::mul(x, Simd::load(scale)));
        }
    }
}

// Keys whose panels are floats, or heads that are no whole vectors.
inline void add_float_scores(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, bool every) {
    const ExactRowsView& e = c.args->exact;
    const int d = c.k->head_dim;
    memset(s.added, 0, static_cast<size_t>(u.n_rows) * kTileKeys * sizeof(float));
    for (int first = 0; first < n; first += kResidualGroup) {
        const int m = n - first < kResidualGroup ? n - first : kResidualGroup;
        const int32_t* list = s.exact_list + first;
        const ResidualGroup keys(*c.k_residual, lut, e, true, u.kv_head, list, m, s.residual);
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            const int n_rows = u.n_rows - r < kExactRows ? u.n_rows - r : kExactRows;
            const float* q[kExactRows];
            for (int i = 0; i < n_rows; ++i) q[i] = s.qf + static_cast<size_t>(r + i) * d;
            float dots[kExactRows * kTileKeys];
            exact_scores(n_rows, q, keys.at, m, d, dots);
            for (int i = 0; i < n_rows; ++i)
                for (int k = 0; k < m; ++k)
                    if (every || wants(e, s.rows[r + i], list[k]))
                        s.added[(r + i) * kTileKeys + keys.slot[k]] = keys.scale[k] * dots[i * kTileKeys + k];
        }
    }
}

inline void add_residual_scores(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n) {
    const bool every = one_mask(c.args->exact, s, u.n_rows);
    if (!integer_scores(c))
        add_float_scores(c, u, s, lut, n, every);
    else if (u.n_rows <= kFewRows)
        add_scores_of_few_rows(c, u, s, lut, n, every);
    else
        add_scores_of_many_rows(c, u, s, lut, n, every);
}

// Four rows of int8 at y + i * d as a step of a value panel: [column][4].
inline void interleave_rows(const uint8_t* y, int d, uint8_t* panel) {
    for (int i = 0; i < d; i += Simd::kBytes, panel += 4 * Simd::kBytes) {
        Simd::B even[2], odd[2], out[4];
        Simd::interleave(Simd::load_bytes(y + i), Simd::load_bytes(y + 2 * d + i), &even[0], &even[1]);
        Simd::interleave(Simd::load_bytes(y + d + i), Simd::load_bytes(y + 3 * d + i), &odd[0], &odd[1]);
        for (int h = 0; h < 2; ++h) Simd::interleave(even[h], odd[h], &out[2 * h], &out[2 * h + 1]);
        for (int h = 0; h < 4; ++h) Simd::store_bytes(panel + h * Simd::kBytes, out[h]);
    }
}

// The product that a tile's values go through, over the slots that have residuals, in the place of their panel and weights. Weights are rounded as
// those are, to 8 bits relative to the row's largest.
inline void add_integer_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, bool every,
                               float* acc) {
    const ExactRowsView& e = c.args->exact;
    const int d = c.dim_v, begin = e.cells[s.exact_list[0]] % kTileKeys / 4 * 4;
    int end = begin;
    ResidualScales scales;
    each_residual_group<4>(*c.v_residual, lut, e, false, u.kv_head, s.exact_list, n, s.residual, scales.all, [&](int first) {
        if (first > end) memset(s.v_panel + end * d, 0, static_cast<size_t>(first - end) * d);  // a gap
        interleave_rows(s.residual, d, s.v_panel + first * d);
        end = first + 4;
    });
    for (int r = 0; r < u.n_rows; ++r) {
        const float *scale = scales.of(e, s.rows[r], every, s.exact_list, n), *taken = s.taken + r * kTileKeys;
        Simd::F w[kRowVecs], top = Simd::splat(0);
        for (int i = 0; i < kRowVecs; ++i) {
            w[i] = Simd::mul(Simd::load(taken + i * Simd::kFloats), Simd::load(scale + i * Simd::kFloats));
            top = Simd::max(top, w[i]);
        }
        const float largest = Simd::reduce_max(top), inverse = largest > 1e-30f ? Simd::kWeightMax / largest : 0;
        s.alpha[r] = 1, s.step[r] = largest / Simd::kWeightMax;
        for (int i = 0; i < kRowVecs; ++i)
            Simd::store_as_bytes(s.weights + r * kTileKeys + i * Simd::kFloats, Simd::mul(w[i], Simd::splat(inverse)));
    }
    multiply(ValueProductI8<false>{s.weights + begin, s.v_panel + begin * d, d, s.alpha, s.step, acc, end - begin}, u.n_rows, d);
}

inline void add_float_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, bool every,
                             float* acc) {
    const ExactRowsView& e = c.args->exact;
    const float ones[kExactRows] = {1, 1, 1, 1};
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
                        every || wants(e, s.rows[r + i], list[k]) ? values.scale[k] * s.taken[(r + i) * kTileKeys + values.slot[k]] : 0;
            exact_values(n_rows, weights, values.at, m, ones, acc + static_cast<size_t>(r) * c.dim_v, c.dim_v);
        }
    }
}

inline void add_residual_values(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, const Lut& lut, int n, float* acc) {
    const bool every = one_mask(c.args->exact, s, u.n_rows);
    if (integer_values(c))
        add_integer_values(c, u, s, lut, n, every, acc);
    else
        add_float_values(c, u, s, lut, n, every, acc);
}

}  // namespace
}  // namespace turboquant
