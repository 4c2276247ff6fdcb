// Attention of a block of rows over exact rows (attention.h, ExactRowsView): fp16 vectors, each contiguous, read where they lie. A state of
// their own: their values are in the model's space, the others' accumulators in the rotated one.
#pragma once

namespace turboquant {
namespace {

constexpr int kExactRows = 4;  // query rows and keys of a block of dot products: its sums stay in registers
constexpr int kExactKeys = Simd::kMaxVecs >= 4 ? 4 : 2;

// A value or key of one head in a slot.
inline const uint16_t* exact_vector(const uint8_t* base, size_t stride, int32_t slot, int head, int d) {
    return reinterpret_cast<const uint16_t*>(base + slot * stride) + static_cast<size_t>(head) * d;
}

inline Simd::F load_values(const uint16_t* p) { return Simd::load_halves(p); }
inline Simd::F load_values(const int8_t* p) { return Simd::load_int8(p); }

// scores[r][k] of R rows x K keys, of halves or int8.
template <int R, int K, class T>
inline void exact_dots(const float* const* q, const T* const* keys, int d, float* scores) {
    Simd::F sum[R][K];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) sum[r][k] = Simd::splat(0);
    for (int i = 0; i < d; i += Simd::kFloats) {
        Simd::F key[K];
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) key[k] = load_values(keys[k] + i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Simd::F x = Simd::load(q[r] + i);
#pragma GCC unroll 4
            for (int k = 0; k < K; ++k) sum[r][k] = Simd::fma(x, key[k], sum[r][k]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int k = 0; k < K; ++k) scores[r * kTileKeys + k] = Simd::reduce_add(sum[r][k]);
}

template <int R, class T>
inline void exact_scores(const float* const* q, const T* const* keys, int n, int d, float* scores) {
    int k = 0;
    for (; k + kExactKeys <= n; k += kExactKeys) exact_dots<R, kExactKeys>(q, keys + k, d, scores + k);
    for (; k < n; ++k) exact_dots<R, 1>(q, keys + k, d, scores + k);
}

// The same of up to kExactRows rows.
template <class T>
inline void exact_scores(int n_rows, const float* const* q, const T* const* keys, int n, int d, float* scores) {
    if (n_rows == kExactRows)
        exact_scores<kExactRows>(q, keys, n, d, scores);
    else
        for (int r = 0; r < n_rows; ++r) exact_scores<1>(q + r, keys, n, d, scores + r * kTileKeys);
}

// acc[r][..] = alpha[r] * acc[r][..] + sum_k weights[r][k] * values[k][..], V vectors of R rows.
template <int R, int V, class T>
inline void exact_values_block(const float* weights, const T* const* values, int n, const float* alpha, float* acc, int d) {
    Simd::F sum[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            sum[r][v] = Simd::mul(Simd::splat(alpha[r]), Simd::load(acc + static_cast<size_t>(r) * d + v * Simd::kFloats));
    for (int k = 0; k < n; ++k) {
        Simd::F x[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) x[v] = load_values(values[k] + v * Simd::kFloats);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Simd::F w = Simd::splat(weights[r * kTileKeys + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[r][v] = Simd::fma(w, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) Simd::store(acc + static_cast<size_t>(r) * d + v * Simd::kFloats, sum[r][v]);
}

template <int R, class T>
inline void exact_values(const float* weights, const T* const* values, int n, const float* alpha, float* acc, int d) {
    constexpr int V = kExactKeys;
    const T* at[kTileKeys];
    for (int k = 0; k < n; ++k) at[k] = values[k];
    int i = 0;
    for (; i + V * Simd::kFloats <= d; i += V * Simd::kFloats) {
        exact_values_block<R, V>(weights, at, n, alpha, acc + i, d);
        for (int k = 0; k < n; ++k) at[k] += V * Simd::kFloats;
    }
    for (; i < d; i += Simd::kFloats) {
        exact_values_block<R, 1>(weights, at, n, alpha, acc + i, d);
        for (int k = 0; k < n; ++k) at[k] += Simd::kFloats;
    }
}

// The same of up to kExactRows rows.
template <class T>
inline void exact_values(int n_rows, const float* weights, const T* const* values, int n, const float* alpha, float* acc, int d) {
    if (n_rows == kExactRows)
        exact_values<kExactRows>(weights, values, n, alpha, acc, d);
    else
        for (int r = 0; r < n_rows; ++r)
            exact_values<1>(weights + r * kTileKeys, values, n, alpha + r, acc + static_cast<size_t>(r) * d, d);
}

// The exact rows that some row of the block sees, in order; returns their number.
inline int visible_exact(const AttentionCall& c, const AttentionUnit& u, const Scratch& s) {
    const ExactRowsView& e = c.args->exact;
    if (!e.mask) {
        for (int i = 0; i < e.n; ++i) s.exact_list[i] = i;
        return e.n;
    }
    memset(s.exact_list, 0, e.n * sizeof(int32_t));
    int last = -1;
    for (int r = 0; r < u.n_rows; ++r) {
        if (s.rows[r].mask_row == last) continue;
        last = s.rows[r].mask_row;
        const uint16_t* mask = e.mask + static_cast<size_t>(last) * e.n;
        for (int i = 0; i < e.n; ++i) s.exact_list[i] |= mask[i] ^ kMaskHidden;
    }
    int n = 0;
    for (int i = 0; i < e.n; ++i) {
        const bool seen = s.exact_list[i] != 0;
        s.exact_list[n] = i;
        n += seen;
    }
    return n;
}

inline void attend_exact(const AttentionCall& c, const AttentionUnit& u, const Scratch& s, float* state) {
    const AttentionArgs& a = *c.args;
    const ExactRowsView& e = a.exact;
    const int d = c.k->head_dim;
    float *acc = clear_state(c, s, u.n_rows, state), *scores = static_cast<float*>(s.scores);
    for (int r = 0; r < u.n_rows; ++r) s.rows[r].m = kMinusInfinity, s.rows[r].logit_scale = s.rows[r].term_scale;
    TileScales ones;
    for (int i = 0; i < kTileKeys; ++i) ones.k[i] = ones.v[i] = 1;

    const int n_seen = visible_exact(c, u, s);
    for (int first = 0; first < n_seen; first += kTileKeys) {
        const int n = n_seen - first < kTileKeys ? n_seen - first : kTileKeys;
        const uint16_t *keys[kTileKeys], *values[kTileKeys];
        for (int k = 0; k < n; ++k) {
            const int i = s.exact_list[first + k];
            keys[k] = exact_vector(e.k, e.k_stride, e.k_slots[i], u.kv_head, d);
            values[k] = exact_vector(e.v, e.v_stride, e.v_slots[i], u.kv_head, c.dim_v);
        }
        uint16_t mask[kTileKeys];
        int masked = -1;
        for (int r = 0; r < u.n_rows; r += kExactRows) {
            const int n_rows = u.n_rows - r < kExactRows ? u.n_rows - r : kExactRows;
            const float* q[kExactRows];
            for (int i = 0; i < n_rows; ++i) {
                const auto [t, h] = place(c, u.kv_head, u.row_begin + r + i);
                q[i] = e.q + t * e.q_token_stride + h * e.q_head_stride;
                if (n < kTileKeys) memset(scores + i * kTileKeys + n, 0, (kTileKeys - n) * sizeof(float));
            }
            exact_scores(n_rows, q, keys, n, d, scores);
            for (int i = 0; i < n_rows; ++i) {
                Row& row = s.rows[r + i];
                if (row.mask_row != masked) {
                    masked = row.mask_row;
                    for (int k = 0; k < kTileKeys; ++k)
                        mask[k] = k >= n ? kMaskHidden : e.mask ? e.mask[static_cast<size_t>(masked) * e.n + s.exact_list[first + k]] : 0;
                }
                RowTile io{};
                io.scores = scores + i * kTileKeys;
                io.mask = mask;
                io.weights_f32 = scores + i * kTileKeys;  // in place: a row's scores are in registers by then
                io.l = s.l + (r + i) * Simd::kFloats;
                io.alpha = s.alpha + r + i;
                io.step = s.step + r + i;
                softmax_row(row, io, ones, false, a.logit_softcap);
            }
            exact_values(n_rows, scores, values, n, s.alpha + r, acc + static_cast<size_t>(r) * c.dim_v, c.dim_v);
        }
    }
    save_state(c, s, u.n_rows, state);
}

}  // namespace
}  // namespace turboquant
