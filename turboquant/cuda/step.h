// What a cache asks of the GPU around encoding and attention: rows kept exactly, what becomes of queries. Raw pointers, nothing allocated, capturable, as encode.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/cuda/rows.h"

namespace turboquant::cuda {

/// Rows of a batch that are rounded to fp16 before they are encoded, or kept exactly (cache/exact_rows.h). All pointers on the device.
struct KeepRows {
    const float* x = nullptr;  ///< x[i*stride ..+n_head*head_dim)
    std::size_t stride = 0;
    int n = 0, n_head = 0, head_dim = 0;
    bool keys = false;                      ///< rounded keys lose the bits that a tag takes
    const std::uint8_t* rounded = nullptr;  ///< [n]: rows to round, or null
    const std::int32_t* slots = nullptr;    ///< [n]: slot that takes the row, or -1; or null: no row is kept
    /// The rotation, [head_dim][head_dim], value j of the result is sum_k x_k matrix[k][j]; heads whose format is not rotated are kept as
    /// they are: plain[h] != 0 (or null: none is so).
    const float* matrix = nullptr;
    /// Head sizes that are powers of two need no matrix: [2][head_dim], its value (k, j) is (-1)^|k & j| first[k] second[j]. Or null.
    const float* signs = nullptr;
    const std::uint8_t* plain = nullptr;

    float* out = nullptr;             ///< [n][n_head*head_dim]: the batch, rounded; null: not wanted
    std::uint16_t* halves = nullptr;  ///< [slot][n_head*head_dim]: the rows as they are, fp16
    /// And rotated, fp16, in tiles of raw in fragment order: head h of slot s in tile s/64, at h tiles. Or null.
    std::uint8_t* tiles = nullptr;
    std::size_t tile_stride = 0;  ///< bytes from a tile of all heads to the next

    /// Rows that are set aside, as they are kept where they are rounded, whether they are or not: row i in place aside_places[i] of `aside`,
    /// [place][n_head*head_dim] fp16; -1: not. Or null.
    const std::int32_t* aside_places = nullptr;
    std::uint16_t* aside = nullptr;
};
/// `also`: others, in the same launch where they are alike.
Status keep_rows(const KeepRows& args, Stream stream, const KeepRows* also = nullptr);

/// The mean of keys before RoPE (cache/key_offset.h): of n rows, rows[places[i]] at positions whose cosines and sines are turns (spread_turns).
/// Rounded to fp16. n_head blocks.
struct MeasureMean {
    const std::uint16_t* rows = nullptr;   ///< fp16, [place][n_head*head_dim]
    const std::int32_t* places = nullptr;  ///< [n]
    const float* turns = nullptr;          ///< [n][2*head_dim]
    int n = 0, n_head = 0, head_dim = 0;
    RopeLayout rope;
    float magnitude = 1;                     ///< of the rotation
    const float* scales = nullptr;           ///< [n_head][head_dim], or null
    float* offset = nullptr;                 ///< [n_head][2][head_dim]: as KeyTransform::mu
    std::uint16_t* mean = nullptr;           ///< [n_head][head_dim]: memory of the host; then done[h] = number
    volatile std::uint32_t* done = nullptr;  ///< [n_head]
    std::uint32_t number = 0;
};
Status measure_mean(const MeasureMean& args, Stream stream);

/// Copies rows of n_embd halves between slots, from[i] to to[i]; no slot is in both.
Status move_rows(std::uint16_t* halves, std::size_t n_embd, const std::int64_t* from, const std::int64_t* to, int n, Stream stream);

/// Queries for keys that were transformed (cache/tile_store.h, QueryTransform).
struct TransformQueries {
    const float* q = nullptr;  ///< q[seq*seq_stride + t*token_stride + h*head_stride + i]
    std::size_t token_stride = 0, head_stride = 0;
    int n_seq = 1;  ///< sequences, of n_tokens each; what is made lies one sequence after the other
    std::size_t seq_stride = 0;
    int n_tokens = 0, n_head = 0, n_head_kv = 0, head_dim = 0;
    const float* scales = nullptr;  ///< [n_head_kv][head_dim], or null
    float* scaled = nullptr;        ///< [seq][t][h][head_dim]: q divided by the scales; given with them
    const float* mu = nullptr;      ///< offsets: mu + ids[k]*mu_stride, [n_head_kv][2][head_dim]
    std::size_t mu_stride = 0;
    const std::int32_t* ids = nullptr;  ///< [seq][n_terms]
    int n_terms = 0, n_freq = 0;
    RopeLayout rope;
    float* terms = nullptr;  ///< [seq][n_terms][n_tokens][n_head][2*n_freq]
};
Status transform_queries(const TransformQueries& args, Stream stream);

}  // namespace turboquant::cuda
