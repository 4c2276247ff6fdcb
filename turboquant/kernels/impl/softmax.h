// Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022) of one row over one tile of 64 keys, in base 2.
#pragma once

namespace turboquant {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();

// What a query row carries from tile to tile, and its constants.
struct Row {
    float logit_scale;     // of the integer or float score, to logits in base 2 (before a soft-cap: to natural logits)
    float term_scale;      // of e_j likewise
    float bias;            // the panel's bias in the integer score
    float slope;           // of the mask
    float m;               // running maximum
    const uint16_t* mask;  // at cell 0; null: all visible
    int mask_row;          // token * mask_heads + mask head: of patches and of exact rows' masks
};

struct TileScales {
    alignas(64) float k[kTileKeys];
    alignas(64) float v[kTileKeys];
};

// Where one row's tile goes.
struct RowTile {
    const void* scores;    // 64 int32 or float
    const float* term;     // 64 e_j, or null
    const float* added;    // 64 floats more of q.k, or null: what residuals add
    const uint16_t* mask;  // 64 halves, or null
    uint8_t* weights_i8;   // 64 bytes, or null: then
    float* weights_f32;    // 64 floats
    float* taken;          // out: 64 weights without the value scales, or null
    float* l;              // kFloats partial sums
    float *alpha, *step;   // out: factors of the old accumulator and of the product to come
};

constexpr int kRowVecs = kTileKeys / Simd::kFloats;

// Logits in base 2 into x; returns their maximum.
inline float row_logits(const Row& row, const RowTile& io, const TileScales& s, bool i8, float softcap, Simd::F (&x)[kRowVecs]) {
    const Simd::F scale = Simd::splat(row.logit_scale);
    for (int i = 0; i < kRowVecs; ++i) {
        const int o = i * Simd::kFloats;
        const Simd::F raw = i8 ? Simd::sub(Simd::load_ints(static_cast<const int32_t*>(io.scores) + o), Simd::splat(row.bias))
                               : Simd::load(static_cast<const float*>(io.scores) + o);
        x[i] = Simd::mul(raw, Simd::mul(scale, Simd::load(s.k + o)));
    }
    if (io.term)
        for (int i = 0; i < kRowVecs; ++i) x[i] = Simd::fma(Simd::load(io.term + i * Simd::kFloats), Simd::splat(row.term_scale), x[i]);
    if (io.added)
        for (int i = 0; i < kRowVecs; ++i) x[i] = Simd::fma(Simd::load(io.added + i * Simd::kFloats), Simd::splat(row.term_scale), x[i]);
    if (softcap != 0)
        for (auto& v : x) v = Simd::mul(tanh(Simd::mul(v, Simd::splat(1 / softcap))), Simd::splat(softcap * kLog2e));
    if (io.mask)
        for (int i = 0; i < kRowVecs; ++i)
            x[i] = Simd::fma(Simd::load_halves(io.mask + i * Simd::kFloats), Simd::splat(row.slope * kLog2e), x[i]);
    Simd::F top = x[0];
    for (int i = 1; i < kRowVecs; ++i) top = Simd::max(top, x[i]);
    return Simd::reduce_max(top);
}

inline void softmax_row(Row& row, const RowTile& io, const TileScales& s, bool i8, float softcap) {
    Simd::F x[kRowVecs];
    const float top = row_logits(row, io, s, i8, softcap, x);
    *io.alpha = 1;
    if (!(top > kMinusInfinity)) {  // no cell of this tile is visible
        *io.step = 0;
        if (io.weights_i8) memset(io.weights_i8, 0, kTileKeys);
        if (io.weights_f32) memset(io.weights_f32, 0, kTileKeys * sizeof(float));
        if (io.taken) memset(io.taken, 0, kTileKeys * sizeof(float));
        return;
    }
    if (top > row.m) {
        *io.alpha = row.m > kMinusInfinity ? exp2(row.m - top) : 0;
        row.m = top;
    }
    Simd::F sum = Simd::mul(Simd::load(io.l), Simd::splat(*io.alpha)), w_max = Simd::splat(0);
    for (int i = 0; i < kRowVecs; ++i) {
        x[i] = exp2(Simd::sub(x[i], Simd::splat(row.m)));
        sum = Simd::add(sum, x[i]);
        if (io.taken) Simd::store(io.taken + i * Simd::kFloats, x[i]);
        x[i] = Simd::mul(x[i], Simd::load(s.v + i * Simd::kFloats));
        w_max = Simd::max(w_max, x[i]);
    }
    Simd::store(io.l, sum);
    *io.step = 1;
    if (!io.weights_i8) {
        for (int i = 0; i < kRowVecs; ++i) Simd::store(io.weights_f32 + i * Simd::kFloats, x[i]);
        return;
    }
    // The value scales are in the weights, so the weights' rounding is relative to the largest contribution of this tile.
    const float top_weight = Simd::reduce_max(w_max), inverse = top_weight > 1e-30f ? Simd::kWeightMax / top_weight : 0;
    *io.step = top_weight / Simd::kWeightMax;
    for (int i = 0; i < kRowVecs; ++i) Simd::store_as_bytes(io.weights_i8 + i * Simd::kFloats, Simd::mul(x[i], Simd::splat(inverse)));
}

}  // namespace
}  // namespace turboquant
