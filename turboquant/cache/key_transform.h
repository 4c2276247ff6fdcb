// What is done to keys before they are quantized, as plain data: it is decided on the host (key_offset.h) and applied by whoever holds the
// bytes (tile_store.h). Stored is s * (k - R(p) mu), channel by channel: p the position of the key's cell, mu the offset that goes with the
// cell's id, s the channels' scales.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include "turboquant/attention/turns.h"
#include "turboquant/cache/positions.h"
#include "turboquant/cache/rope.h"
#include "turboquant/codec/codec.h"

namespace turboquant {

/// Rotations by a position, from a table that all heads and layers share.
struct RopeTable {
    const float* turns = nullptr;  ///< attention/turns.h
    int n_freq = 0;
    int n_dims = 0, n_offset = 0;  ///< rotated dims of a head; 0: none, the offset is the same at all positions
    RopePairs pairs = RopePairs::adjacent;
    std::span<const double> frequencies;  ///< [n_freq], radians per position; a last one of zero where RoPE leaves dims alone
};

struct KeyTransform {
    const std::int32_t* cells = nullptr;  ///< of all rows: position and offset id (CellPositions::packed)
    /// By offset id: per head [2][head_dim], mu (with YaRN's magnitude), then mu_perp, which is mu turned by 90 degrees in every pair that
    /// RoPE rotates; R(p) mu = mu * C(p) + mu_perp * S(p), value by value (attention/turns.h). Both scaled. Null also where
    /// the store has measured it itself (TileStore::measure).
    std::array<const float*, CellPositions::kMaxOffsets> mu{};
    RopeTable rope;
    float magnitude = 1;            ///< of RoPE: YaRN's
    const float* scales = nullptr;  ///< [n_head][head_dim], or null
    std::uint64_t version = 0;      ///< of mu, rope and scales: for those who keep copies
};

/// a_0.., b_0.. (2*n_freq floats) of one query vector: q . R(p) mu = sum_i a_i cos(p w_i) + b_i sin(p w_i). `mu`: of the KV head, mu and
/// mu_perp (KeyTransform::mu).
inline void query_terms(const RopeTable& rope, int head_dim, const float* mu, const float* q, float* terms) {
    const float* perp = mu + head_dim;
    const int pairs = rope.n_dims / 2, n = rope.n_freq;
    const int step = rope.pairs == RopePairs::adjacent ? 2 : 1, apart = rope.pairs == RopePairs::adjacent ? 1 : pairs;
    for (int i = 0; i < pairs; i++) {
        const int x = rope.n_offset + i * step, y = x + apart;
        terms[i] = q[x] * mu[x] + q[y] * mu[y];
        terms[n + i] = q[x] * perp[x] + q[y] * perp[y];
    }
    if (n == pairs) return;
    terms[pairs] = terms[n + pairs] = 0;
    for (int i = 0; i < head_dim; i++)
        if (i < rope.n_offset || i >= rope.n_offset + rope.n_dims) terms[pairs] += q[i] * mu[i];
}

/// C(pos) and S(pos): the cosine and sine that apply to each dim of a head, 2*head_dim floats.
inline void spread_turn(const RopeTable& rope, int head_dim, std::int32_t pos, float* turn) {
    constexpr int most = turn_width(*std::max_element(std::begin(kHeadDims), std::end(kHeadDims)) / 2);
    std::fill_n(turn, head_dim, 1.0f);
    std::fill_n(turn + head_dim, head_dim, 0.0f);
    if (rope.n_dims == 0) return;
    float row[2 * most];
    turn_row(rope.turns, rope.n_freq, pos, row);
    const float *c = row, *s = row + turn_width(rope.n_freq);
    const int pairs = rope.n_dims / 2;
    float *cosines = turn + rope.n_offset, *sines = cosines + head_dim;
    if (rope.pairs == RopePairs::split) {
        for (int half = 0; half < 2; half++) std::copy_n(c, pairs, cosines + half * pairs), std::copy_n(s, pairs, sines + half * pairs);
    } else {
        for (int i = 0; i < 2 * pairs; i++) cosines[i] = c[i / 2], sines[i] = s[i / 2];
    }
}

}  // namespace turboquant
