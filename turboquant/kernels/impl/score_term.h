// The positional score term (attention.h, ScoreTerm) of a block of rows over one tile:
//   e_j = sum_i a_i cos(p_j w_i) + b_i sin(p_j w_i).
//
// Cells of a tile mostly hold successive positions p, p+1, ... Then a and b are turned once to the tile's middle c = p + 32,
//   a' = a cos(c w) + b sin(c w),   b' = b cos(c w) - a sin(c w),
//   e(c + m) = sum a' cos(m w) + b' sin(m w) = C_m + S_m,   e(c - m) = C_m - S_m,
// so that one small constant panel (m = 0..31) serves all tiles, and each product serves two keys. Exact, but for float rounding.
// Rotations by p and by c come from the rows of their digits (attention/turns.h), which are padded as everything here is.
#pragma once

namespace turboquant {
namespace {

constexpr int kHalfTile = kTileKeys / 2;

struct TermScratch {
    int n_freq, n_pad;    // n_pad: rounded up to whole vectors; what is added is zero
    float* query;         // [n_terms][rows][2*n_pad]: a, b
    size_t query_stride;  // between terms
    float* turned_a;      // [rows][n_pad]
    float* turned_b;
    float* panel_cos;  // [n_pad][32]
    float* panel_sin;
    float* even;   // [rows][32]: C_m
    float* odd;    // [rows][32]: S_m; a lane beyond the last row is read, and not used
    float* place;  // [2*n_pad]: the rotation by one position
    float* out;    // [rows][64]: e_j

    TermScratch(const AttentionCall& c, uint8_t* scratch) : n_freq(c.args->term.n_freq), n_pad(c.term_at.n_pad) {
        const TermLayout& t = c.term_at;
        float* base = reinterpret_cast<float*>(scratch + c.term);
        query = base + t.query, query_stride = t.query_stride;
        turned_a = base + t.turned_a, turned_b = base + t.turned_b;
        panel_cos = base + t.panel_cos, panel_sin = base + t.panel_sin;
        place = base + t.place, out = base + t.out;
        even = base + t.even, odd = base + t.odd;
    }
};

// A row of n cosines and n sines, each padded with zeros.
inline void pad_term(const TermScratch& s, const float* from, float* to) {
    for (int half = 0; half < 2; ++half) {
        memcpy(to + half * s.n_pad, from + half * s.n_freq, s.n_freq * sizeof(float));
        memset(to + half * s.n_pad + s.n_freq, 0, (s.n_pad - s.n_freq) * sizeof(float));
    }
}

inline float term_dot(const TermScratch& s, const float* a, const float* b) {
    Simd::F sum = Simd::splat(0);
    for (int i = 0; i < 2 * s.n_pad; i += Simd::kFloats) sum = Simd::fma(Simd::load(a + i), Simd::load(b + i), sum);
    return Simd::reduce_add(sum);
}

// Row r of a digit of the table.
inline const float* turn_of(const TermScratch& s, const float* turns, int digit, int r) {
    return turns + static_cast<size_t>(digit * kTurnRadix + r) * 2 * s.n_pad;
}

// The rotation by a position: the product over its digits.
inline void find_place(const TermScratch& s, const float* turns, int32_t pos) {
    const float* by[kTurnDigits];
    int n = 0;
    uint32_t rest = static_cast<uint32_t>(pos);
    for (int digit = 0; digit < kTurnDigits; ++digit, rest /= kTurnRadix)
        if (const int r = static_cast<int>(rest % kTurnRadix); r || digit == 0) by[n++] = turn_of(s, turns, digit, r);
    for (int i = 0; i < s.n_pad; i += Simd::kFloats) {
        Simd::F c = Simd::load(by[0] + i), w = Simd::load(by[0] + s.n_pad + i);
        for (int k = 1; k < n; ++k) {
            const Simd::F bc = Simd::load(by[k] + i), bw = Simd::load(by[k] + s.n_pad + i), product = Simd::mul(w, bw);
            w = Simd::fma(w, bc, Simd::mul(c, bw));
            c = Simd::sub(Simd::mul(c, bc), product);
        }
        Simd::store(s.place + i, c);
        Simd::store(s.place + s.n_pad + i, w);
    }
}

// Once per thread and call, when a tile needs it.
inline void build_term_panels(const TermScratch& s, const float* turns) {
    for (int m = 0; m < kHalfTile; ++m) {
        const float* row = turn_of(s, turns, 0, m);
        for (int i = 0; i < s.n_pad; ++i) s.panel_cos[i * kHalfTile + m] = row[i], s.panel_sin[i * kHalfTile + m] = row[s.n_pad + i];
    }
}

inline void turn_terms(const TermScratch& s, const float* query, int n_rows) {
    for (int i = 0; i < s.n_pad; i += Simd::kFloats) {
        const Simd::F c = Simd::load(s.place + i), w = Simd::load(s.place + s.n_pad + i);
        for (int r = 0; r < n_rows; ++r) {
            const float* q = query + static_cast<size_t>(r) * 2 * s.n_pad + i;
            const Simd::F a = Simd::load(q), b = Simd::load(q + s.n_pad);
            Simd::store(s.turned_a + static_cast<size_t>(r) * s.n_pad + i, Simd::fma(a, c, Simd::mul(b, w)));
            Simd::store(s.turned_b + static_cast<size_t>(r) * s.n_pad + i, Simd::sub(Simd::mul(b, c), Simd::mul(a, w)));
        }
    }
}

// e(c - 32), which is outside of the panel.
inline float first_term(const TermScratch& s, const float* turns, int row) {
    const float *a = s.turned_a + static_cast<size_t>(row) * s.n_pad, *b = s.turned_b + static_cast<size_t>(row) * s.n_pad;
    const float *c = turn_of(s, turns, 0, kHalfTile), *w = c + s.n_pad;
    Simd::F even = Simd::splat(0), odd = Simd::splat(0);
    for (int i = 0; i < s.n_pad; i += Simd::kFloats) {
        even = Simd::fma(Simd::load(a + i), Simd::load(c + i), even);
        odd = Simd::fma(Simd::load(b + i), Simd::load(w + i), odd);
    }
    return Simd::reduce_add(Simd::sub(even, odd));
}

inline void successive_terms(const TermScratch& s, const float* query, const float* turns, int32_t first, int n_rows) {
    find_place(s, turns, first + kHalfTile);
    turn_terms(s, query, n_rows);
    multiply(ProductF32{s.turned_a, s.n_pad, s.panel_cos, kHalfTile, nullptr, s.even}, n_rows, kHalfTile);
    multiply(ProductF32{s.turned_b, s.n_pad, s.panel_sin, kHalfTile, nullptr, s.odd}, n_rows, kHalfTile);
    for (int r = 0; r < n_rows; ++r) {
        const float *even = s.even + r * kHalfTile, *odd = s.odd + r * kHalfTile;
        float* e = s.out + r * kTileKeys;
        for (int k = 0; k < kHalfTile; k += Simd::kFloats) {
            Simd::store(e + kHalfTile + k, Simd::add(Simd::load(even + k), Simd::load(odd + k)));
            const int m = kHalfTile - k - Simd::kFloats + 1;  // keys k.. are m = 32-k downwards
            Simd::store(e + k, Simd::reverse(Simd::sub(Simd::load(even + m), Simd::load(odd + m))));
        }
        e[0] = first_term(s, turns, r);
    }
}

// Any positions.
inline void scattered_terms(const TermScratch& s, const ScoreTerm& t, int cell, int n_cells, int n_rows) {
    const int32_t* pos = t.cell_pos + cell;
    for (int j = 0; j < kTileKeys; ++j) {
        const bool has_term = j < n_cells && pos[j] >= 0;
        if (has_term) find_place(s, t.turns, pos[j]);
        const float* query = s.query + (has_term && t.cell_term ? t.cell_term[cell + j] : 0) * s.query_stride;
        for (int r = 0; r < n_rows; ++r)
            s.out[r * kTileKeys + j] = has_term ? term_dot(s, query + static_cast<size_t>(r) * 2 * s.n_pad, s.place) : 0;
    }
}

inline bool successive(const ScoreTerm& t, int cell, int n) {
    const int32_t* pos = t.cell_pos + cell;
    bool all = n == kTileKeys && pos[0] >= 0;
    for (int j = 0; j < n; ++j) all &= pos[j] == pos[0] + j;
    for (int j = 1; t.cell_term && j < n; ++j) all &= t.cell_term[cell + j] == t.cell_term[cell];
    return all;
}

// e_j of n_rows rows to s.out. `panels_built` is the thread's.
inline void score_terms(const TermScratch& s, const ScoreTerm& t, int cell, int n_cells, int n_rows, bool* panels_built) {
    if (!successive(t, cell, n_cells)) return scattered_terms(s, t, cell, n_cells, n_rows);
    if (!*panels_built) build_term_panels(s, t.turns);
    *panels_built = true;
    const float* query = s.query + (t.cell_term ? t.cell_term[cell] : 0) * s.query_stride;
    successive_terms(s, query, t.turns, t.cell_pos[cell], n_rows);
}

}  // namespace
}  // namespace turboquant
