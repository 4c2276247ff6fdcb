// Bodies of the kernels of step.h: one value each, no words between threads, so that the host runs them as they are.
#pragma once

#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/impl/simt.h"
#include "turboquant/cuda/step.h"

namespace turboquant::cuda {

inline constexpr int kTagged = 96;  // cache/saved_row.h, kTagValues; rows of 64 values and more

/// Without what a tag of a saved row would change.
TQ_DEVICE std::uint16_t untagged(const KeepRows& a, int dim, std::uint16_t half) {
    return a.keys && dim < kTagged && a.n_head * a.head_dim >= 64 ? half & 0xfffe : half;
}

/// Value k of a head of row i as it is kept: fp16, if it is rounded or kept at all.
TQ_DEVICE float kept_value(const KeepRows& a, int i, int dim) {
    const std::uint16_t h = half_bits(a.x[i * a.stride + dim]);
    return half_value(a.rounded && a.rounded[i] ? untagged(a, dim, h) : h);
}

/// Value j of a head; `kept`: kept_value of the whole head, `signed_kept`: that times the first signs.
TQ_DEVICE void keep_value(const KeepRows& a, int i, int head, int j, const float* kept, const float* signed_kept) {
    const int dim = head * a.head_dim + j, n_embd = a.n_head * a.head_dim;
    if (a.out) a.out[static_cast<std::size_t>(i) * n_embd + dim] = a.rounded && a.rounded[i] ? kept[j] : a.x[i * a.stride + dim];
    const int slot = a.slots ? a.slots[i] : -1, place = a.aside_places ? a.aside_places[i] : -1;
    if (place >= 0) a.aside[static_cast<std::size_t>(place) * n_embd + dim] = untagged(a, dim, half_bits(a.x[i * a.stride + dim]));
    if (slot < 0) return;
    a.halves[static_cast<std::size_t>(slot) * n_embd + dim] = half_bits(kept[j]);
    if (!a.tiles) return;
    float v = kept[j];
    if ((!a.plain || !a.plain[head]) && a.signs) {
        float sum[2] = {};
        for (int k = 0; k < a.head_dim; k += 2) {
            sum[0] += flip(signed_kept[k], popc(static_cast<std::uint32_t>(j & k)) & 1);
            sum[1] += flip(signed_kept[k + 1], popc(static_cast<std::uint32_t>(j & (k + 1))) & 1);
        }
        v = (sum[0] + sum[1]) * a.signs[a.head_dim + j];
    } else if (!a.plain || !a.plain[head]) {
        // Many loads at once: the matrix comes from the second-level cache, and a row is all that a step of decoding has.
        constexpr int kAtOnce = 16;
        float sum[4] = {};
        for (int k = 0; k < a.head_dim; k += kAtOnce) {
            float column[kAtOnce];
            for (int l = 0; l < kAtOnce; ++l) column[l] = a.matrix[(k + l) * a.head_dim + j];
            for (int l = 0; l < kAtOnce; ++l) sum[l % 4] += kept[k + l] * column[l];
        }
        v = sum[0] + sum[1] + (sum[2] + sum[3]);
    }
    const FragmentBit at = fragment_bit(FragmentFormat{Family::raw, 16}, a.keys ? Side::key : Side::value, a.head_dim, slot % 64, j, 0);
    std::uint8_t* tile = a.tiles + slot / 64 * a.tile_stride + static_cast<std::size_t>(head) * 128 * a.head_dim;
    reinterpret_cast<std::uint16_t*>(tile + fragment_word_offset(a.head_dim, at.lane, at.word))[at.shift / 16] = half_bits(v);
}

/// keep_value of a head by one warp, whose lane has the values lane + 32 k, for head sizes that are powers of two.
template <int n>
TQ_DEVICE void keep_head(const KeepRows& a, int i, int head, int lane) {
    const int head_dim = 32 * n, n_embd = a.n_head * head_dim;
    const int slot = a.slots ? a.slots[i] : -1, place = a.aside_places ? a.aside_places[i] : -1;
    const bool rounded = a.rounded && a.rounded[i], turned = a.tiles && slot >= 0 && (!a.plain || !a.plain[head]);
    float x[n], y[n];
    for (int k = 0; k < n; ++k) x[k] = a.x[i * a.stride + head * head_dim + lane + 32 * k];
    for (int k = 0; k < n; ++k) {
        const int j = lane + 32 * k, dim = head * head_dim + j;
        const std::uint16_t bits = half_bits(x[k]), half = rounded ? untagged(a, dim, bits) : bits;
        y[k] = half_value(half);
        if (place >= 0) a.aside[static_cast<std::size_t>(place) * n_embd + dim] = untagged(a, dim, bits);
        if (a.out) a.out[static_cast<std::size_t>(i) * n_embd + dim] = rounded ? y[k] : x[k];
        if (slot >= 0) a.halves[static_cast<std::size_t>(slot) * n_embd + dim] = half;
        if (turned) y[k] *= a.signs[j];
    }
    if (!a.tiles || slot < 0) return;
    if (turned) {
        for (int h = 1; h < n; h *= 2)
            for (int k = 0; k < n; ++k)
                if (!(k & h)) {
                    const float p = y[k], q = y[k + h];
                    y[k] = p + q, y[k + h] = p - q;
                }
        for (int d = 1; d < 32; d *= 2)
            for (int k = 0; k < n; ++k) {
                const float other = shfl_xor(y[k], d);
                y[k] = lane & d ? other - y[k] : y[k] + other;
            }
        for (int k = 0; k < n; ++k) y[k] *= a.signs[head_dim + lane + 32 * k];
    }
    std::uint8_t* tile = a.tiles + slot / 64 * a.tile_stride + static_cast<std::size_t>(head) * 128 * head_dim;
    for (int k = 0; k < n; ++k) {
        const FragmentBit at =
            fragment_bit(FragmentFormat{Family::raw, 16}, a.keys ? Side::key : Side::value, head_dim, slot % 64, lane + 32 * k, 0);
        reinterpret_cast<std::uint16_t*>(tile + fragment_word_offset(head_dim, at.lane, at.word))[at.shift / 16] = half_bits(y[k]);
    }
}

/// Value i of a head's mean.
TQ_DEVICE void mean_value(const MeasureMean& a, int head, int i) {
    const int at = i - a.rope.n_offset, pairs = a.rope.n_dims / 2, apart = a.rope.adjacent ? 1 : pairs;
    const bool turned = at >= 0 && at < a.rope.n_dims, second = turned && (a.rope.adjacent ? at % 2 == 1 : at >= pairs);
    const int other = turned ? (second ? i - apart : i + apart) : i, n_embd = a.n_head * a.head_dim;
    constexpr int kAtOnce = 8;  // loads that do not wait for each other
    double sum = 0;
    for (int k0 = 0; k0 < a.n; k0 += kAtOnce) {
        float x[kAtOnce], y[kAtOnce], c[kAtOnce], s[kAtOnce];
        for (int l = 0; l < kAtOnce; ++l) {
            const int k = k0 + l < a.n ? k0 + l : a.n - 1;
            const std::uint16_t* row = a.rows + static_cast<std::size_t>(a.places[k]) * n_embd + head * a.head_dim;
            const float* turn = a.turns + static_cast<std::size_t>(k) * 2 * a.head_dim;
            x[l] = half_value(row[i]), y[l] = half_value(row[other]);
            c[l] = turn[i], s[l] = turn[a.head_dim + i];
        }
        for (int l = 0; l < kAtOnce && k0 + l < a.n; ++l)
            sum += !turned ? x[l] : (second ? x[l] * c[l] - y[l] * s[l] : x[l] * c[l] + y[l] * s[l]) / a.magnitude;
    }
    const std::uint16_t half = half_bits(static_cast<float>(sum / a.n));
    a.mean[head * a.head_dim + i] = half;
    const float mu = half_value(half) * (turned ? a.magnitude : 1), scale = a.scales ? a.scales[head * a.head_dim + i] : 1;
    float *value = a.offset + static_cast<std::size_t>(2 * head) * a.head_dim, *quarter = value + a.head_dim;
    value[i] = mu * scale;
    const float scale_of_other = a.scales ? a.scales[head * a.head_dim + other] : 1;
    quarter[other] = turned ? (second ? -mu : mu) * scale_of_other : 0;
}

TQ_DEVICE float query_value(const TransformQueries& a, int t, int h, int i) {
    const int seq = t / a.n_tokens;  // t: of all sequences
    const float q = a.q[seq * a.seq_stride + (t - seq * a.n_tokens) * a.token_stride + h * a.head_stride + i];
    return a.scales ? q / a.scales[h / (a.n_head / a.n_head_kv) * a.head_dim + i] : q;
}

TQ_DEVICE void scale_query_value(const TransformQueries& a, int t, int h, int i) {
    a.scaled[(static_cast<std::size_t>(t) * a.n_head + h) * a.head_dim + i] = query_value(a, t, h, i);
}

/// Frequency i of a query's term.
TQ_DEVICE void query_term(const TransformQueries& a, int term, int t, int h, int i) {
    const int kv = h / (a.n_head / a.n_head_kv), pairs = a.rope.n_dims / 2, seq = t / a.n_tokens;
    const float *mu = a.mu + a.ids[seq * a.n_terms + term] * a.mu_stride + 2 * static_cast<std::size_t>(kv) * a.head_dim,
                *quarter = mu + a.head_dim;
    float* to =
        a.terms + ((static_cast<std::size_t>(seq * a.n_terms + term) * a.n_tokens + t - seq * a.n_tokens) * a.n_head + h) * 2 * a.n_freq;
    if (i < pairs) {
        const int x = a.rope.n_offset + (a.rope.adjacent ? 2 * i : i), y = x + (a.rope.adjacent ? 1 : pairs);
        const float qx = query_value(a, t, h, x), qy = query_value(a, t, h, y);
        to[i] = qx * mu[x] + qy * mu[y];
        to[a.n_freq + i] = qx * quarter[x] + qy * quarter[y];
        return;
    }
    float sum = 0;
    for (int d = 0; d < a.head_dim; ++d)
        if (d < a.rope.n_offset || d >= a.rope.n_offset + a.rope.n_dims) sum += query_value(a, t, h, d) * mu[d];
    to[i] = sum, to[a.n_freq + i] = 0;
}

}  // namespace turboquant::cuda
