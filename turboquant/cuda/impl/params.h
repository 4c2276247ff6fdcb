// What a launch hands to the attention kernels: plain data, in constant memory.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "turboquant/cuda/impl/format_table.h"

namespace turboquant::cuda {

/// One side of the compressed cache, or of the exact rows.
struct SideParams {
    const std::uint8_t* tiles;
    std::size_t seq_stride, head_stride, tile_stride;  // bytes
    const std::size_t* head_at;                        // formats per head: bytes of each head's tile 0; null: head * head_stride
    const std::uint8_t* head_codec;                    // indices into kFragmentCodecs, or null
    int codec;                                         // of all heads, if head_codec is null
};

/// A tile's positions in one word: the first, and from this bit on the number of its term (attention.h, summarize_positions).
inline constexpr int kTileTermBit = 28;

/// All blocks of a launch fetch the term's panel at the same time: one copy lies in too few parts of the second-level cache.
inline constexpr int kPanelCopies = 8;

struct TermParams {
    int n_freq, n_pad;  // 0: no term; padded to 16
    int n_terms;
    const float* q_term;  // [seq][n_terms][token][head][2*n_freq]; null: of the queries and these, in the kernel
    const float* mu;      // attention.h, QueryTerms
    std::size_t mu_stride;
    const std::int32_t* ids;
    int rope_pairs, rope_offset;
    bool rope_adjacent;
    std::size_t seq_stride;         // in floats
    const float2* turns;            // attention.h, make_term_turns
    const uint4* panel;             // make_term_panel; null: it does not fit in shared memory, the term is made key by key
    const std::int32_t* tile_pos;   // [seq][tile], kTileTermBit
    const std::int32_t* cell_pos;   // [seq][cell]
    const std::uint8_t* cell_term;  // [seq][cell] or null
    std::size_t tile_seq_stride, cell_seq_stride;
    const float* offset;           // [n_terms][kv head][cosine, sine][head_dim] or null
    const std::uint8_t* dim_freq;  // [head_dim]
};

/// What a mask says to a query of a tile's cells, as bits: some value is not zero, some cell is visible.
enum MaskTile : std::uint8_t { kMaskCounts = 1, kMaskShows = 2 };

/// Item of a call: a range of one sequence's tiles, or its exact rows.
struct AttentionItem {
    std::int32_t seq, split, n_splits, first_item;  // split n_splits-1 is the exact rows', if there are any
};

struct AttentionParams {
    SideParams k, v, exact_k, exact_v;
    const float *q, *exact_q;
    float* out;
    float* lse;
    std::size_t q_seq_stride, q_token_stride, q_head_stride, out_seq_stride, out_token_stride, out_head_stride;  // in floats
    int n_head, n_head_kv, group, n_tokens, n_rows, n_row_blocks;
    int n_kv;                      // of all sequences, if seq_n_kv is null
    const std::int32_t* seq_n_kv;  // [seq]
    const std::int32_t* exact_n;   // [seq] or null
    const AttentionItem* items;    // compressed ones, then exact ones; null: splits_each per sequence, in order
    int splits_each, n_seq, n_compressed;
    bool has_exact, causal;
    bool parts_only;  // all blocks leave their parts, another launch merges them (join.cuh)
    int window;
    const std::uint16_t *mask, *exact_mask;
    const std::uint8_t *mask_tiles, *exact_mask_tiles;  // [seq][token][tile]: MaskTile; null: not known
    int exact_tiles;                                    // of the latter
    std::size_t mask_seq_stride, mask_token_stride, mask_head_stride, exact_mask_seq_stride, exact_mask_token_stride;  // in halves
    int mask_heads;
    float scale, softcap, max_bias;
    const float* sinks;
    TermParams term;
    const float *signs_in, *signs_out, *hartley;
    FormatTable table[kFragmentCodecCount];
    const std::uint32_t* lut;  // [kFragmentCodecCount][256]: levels of formats that are looked up in shared memory
    float* part;               // [item][kv head][row block][rows][head_dim]
    float2* part_ml;           // [item][kv head][row block][rows]
    unsigned* count;           // [seq][kv head][row block], zero between runs
};

}  // namespace turboquant::cuda
