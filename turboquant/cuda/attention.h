// Attention on the GPU over tiles in fragment order (fragment_order.h): decode (few query tokens), drafts, prefill. What is computed is
// attention/attention.h's definition, with the int8 levels of the codebooks (codec/codebook.h) for formats of up to 4 bits.
//
// Plan and run are apart: a plan holds what depends on sizes alone and says how much device memory a run needs; nothing is allocated in a
// run, and a run can be captured in a CUDA graph and replayed with other contents, positions and lengths up to those planned for.
// All pointers in arguments are device pointers unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "turboquant/codec/codec.h"
#include "turboquant/cuda/impl/format_table.h"
#include "turboquant/cuda/rows.h"
#include "turboquant/cuda/status.h"
#include "turboquant/cuda/step.h"

namespace turboquant::cuda {

/// Constants of all formats at one head size, on the device: rotation and look-ups. Made once, shared by all layers and contexts.
struct AttentionTables {
    int head_dim = 0;
    FormatTable formats[kFragmentCodecCount];
    const float *signs_in = nullptr, *signs_out = nullptr, *hartley = nullptr;  ///< device
    const std::uint32_t* lut = nullptr;                                         ///< device
};
std::size_t attention_table_bytes(int head_dim);
/// Builds the tables in `device` (attention_table_bytes, owned by the caller); synchronizes `stream`.
Status upload_attention_tables(AttentionTables& tables, int head_dim, void* device, Stream stream);

/// Head sizes above this are MLA's, whose values lie within its keys.
inline constexpr int kMostAttentionHeadDim = 512;
constexpr bool attention_serves(int head_dim) { return head_dim <= kMostAttentionHeadDim && head_dim_supported(head_dim); }

/// What a plan depends on.
struct AttentionShape {
    int head_dim = 0, n_head = 0, n_head_kv = 0;
    int n_tokens = 1;              ///< query tokens of each sequence
    std::span<const int> n_kv;     ///< host: cells of each sequence, at most; run reads no more
    bool exact_windows = false;    ///< rows kept in fp16 beside the compressed ones: one more part per head
    bool uniform_lengths = false;  ///< plan as if all sequences had the longest's length: no table of parts is read
    /// Host: formats that keys and values of any head may have. Prefill takes calls of many query rows only where these are known
    /// (docs/cuda.md, Prefill, says which calls); empty: any, and the decode kernels do all.
    std::span<const CodecId> formats = {};
    bool term = false;  ///< calls have a score term
};

struct AttentionPlan {
    int head_dim = 0, n_head = 0, n_head_kv = 0, n_tokens = 0, n_seq = 0, n_kv = 0;
    int groups = 0;        ///< of four query rows per block; a row is (token, head of the group)
    int n_row_blocks = 0;  ///< blocks that share a head's tiles
    bool exact_windows = false;
    int splits_each = 0;  ///< of every sequence; 0: as `items` say
    struct Item {
        std::int32_t seq, split, n_splits, first_item;
    };
    std::vector<Item> items;
    int n_items = 0, most_splits = 0;
    std::size_t workspace_bytes = 0, shared_per_block = 0;
    /// Cut of a call that prefill takes (prefill.h); the rest is for those that it cannot.
    struct Prefill {
        int n_splits = 0;                                                       ///< 0: none
        bool wide = false;                                                      ///< keys of 15 bits: calls with a term
        int n_groups = 0, n_panels = 0;                                         ///< of 64 query rows; of 128 cells
        std::size_t panels = 0, queries = 0, units = 0, part = 0, part_ml = 0;  ///< places in the workspace
    } prefill;
};

/// Whether calls of this shape go by prefill, if they bring what it wants (Term::offset, tiles of masks): it can take them, and is faster than
/// the decode kernels (docs/cuda.md, Drafts).
bool takes_prefill(const Device& device, const AttentionShape& shape);
/// Cuts a call so that its blocks fill `device` evenly. Errors: sizes that have no kernel, named.
Status plan_attention(const Device& device, const AttentionShape& shape, AttentionPlan& plan);
/// Readies `workspace` (plan.workspace_bytes, 256-byte aligned) for runs of the plan. Not to be captured; waits for `stream` where the plan has items.
Status prepare_workspace(const AttentionPlan& plan, void* workspace, Stream stream);

/// One side of the cache: tiles of all sequences and heads.
struct Tiles {
    const std::uint8_t* tiles = nullptr;  ///< tile 0 of KV head 0 of sequence 0, 16-byte aligned, as are the strides
    std::size_t seq_stride = 0, head_stride = 0, tile_stride = 0;  ///< bytes
    CodecId codec = CodecId::turbo4;
    /// Formats per head, or null: [n_head_kv] bytes from `tiles` to each head's tile 0, and indices of the formats (format_index()).
    const std::size_t* head_at = nullptr;
    const std::uint8_t* head_format = nullptr;
};
/// What a format is called in Tiles::head_format; -1 for composites, which have no kernel and must not be put there.
int format_index(CodecId codec);

/// Score term (attention/attention.h) with its frequencies' tables (make_term_*).
struct Term {
    int n_freq = 0;                 ///< 0: none
    const float* q_term = nullptr;  ///< [seq][n_terms][n_tokens][n_head][2*n_freq]; or null, and these:
    /// Offsets, from which the kernels make q_term themselves where all pairs of RoPE have one frequency each (n_freq = n_dims/2):
    /// mu + ids[seq*n_terms + k]*mu_stride, [n_head_kv][2][head_dim] (step.h, TransformQueries).
    const float* mu = nullptr;
    std::size_t mu_stride = 0;
    const std::int32_t* ids = nullptr;
    RopeLayout rope;
    std::size_t q_seq_stride = 0;                          ///< floats between sequences
    int n_terms = 1;                                       ///< at most kMaxTerms
    const float* turns = nullptr;                          ///< make_term_turns
    const void* panel = nullptr;                           ///< make_term_panel
    const std::int32_t* tile_pos = nullptr;                ///< [seq][tile]: summarize_positions
    const std::int32_t* cell_pos = nullptr;                ///< [seq][cell]; negative: this cell has no term
    const std::uint8_t* cell_term = nullptr;               ///< [seq][cell], < n_terms; null: 0
    std::size_t tile_seq_stride = 0, cell_seq_stride = 0;  ///< elements between sequences
    /// For prefill, the offset itself; null: the decode kernels serve the call. Dim i of what is added to the key at position p is
    /// offset[term][kv head][0][i] cos(p w_f) + offset[term][kv head][1][i] sin(p w_f), f = dim_freq[i]; nothing where f >= n_freq.
    const float* offset = nullptr;           ///< [n_terms][n_head_kv][2][head_dim], model's space
    const std::uint8_t* dim_freq = nullptr;  ///< [head_dim]
};
inline constexpr int kMaxTerms = 4;

constexpr int term_pad(int n_freq) { return (n_freq + 15) / 16 * 16; }
/// cos, sin of positions 0..63, of 63.5, and of 0, 64, 128, .. up to max_position: [65 + max_position/64 + 1][term_pad][2] floats, for
/// frequencies in radians per position. Shared by all layers that have the same.
std::vector<float> make_term_turns(std::span<const double> frequencies, int max_position);
/// The constant operand, 512*term_pad bytes, and copies of it (impl/params.h, kPanelCopies).
std::vector<std::uint32_t> make_term_panel(std::span<const double> frequencies);
/// What a mask says of every tile to every query token: [seq][token][tile], tile < ceil(n_kv/64). Kernels pass over tiles that nobody of a
/// block sees, and read no mask where it is zero. Once per step, for all layers. `mask`: as in AttentionArgs, of one head.
struct MaskTiles {
    const std::uint16_t* mask = nullptr;
    std::size_t seq_stride = 0, token_stride = 0;
    int n_seq = 1, n_tokens = 0, n_kv = 0;
    std::uint8_t* out = nullptr;  ///< [n_seq][n_tokens][tiles]
};
Status summarize_mask(const MaskTiles& args, Stream stream);

/// For each tile its first position and, from bit 28 on, its term, if its cells (those < n_kv) have successive ones below 2^28 and one term;
/// else -1. Once per step, for all layers.
/// cell_pos, cell_term, tile_pos: as in Term. seq_n_kv: [n_seq] or null: n_kv each.
Status summarize_positions(const Term& term, int n_seq, int n_kv, const std::int32_t* seq_n_kv, std::int32_t* tile_pos, Stream stream);

struct AttentionArgs {
    const AttentionTables* tables = nullptr;
    const float* q = nullptr;  ///< q[seq*q_seq_stride + token*q_token_stride + head*q_head_stride + i], model's space
    float* out = nullptr;
    std::size_t q_seq_stride = 0, q_token_stride = 0, q_head_stride = 0;        ///< in floats
    std::size_t out_seq_stride = 0, out_token_stride = 0, out_head_stride = 0;  ///< in floats
    Tiles k, v;
    const std::int32_t* seq_n_kv = nullptr;  ///< [seq] cells now; null: as planned, all sequences alike

    /// Rows kept exactly, as raw tiles in the space that the others are in (rotated, unless these are raw).
    Tiles exact_k, exact_v;
    const std::int32_t* exact_n = nullptr;  ///< [seq]
    const float* exact_q = nullptr;         ///< strides as q; null: q
    const std::uint16_t* exact_mask = nullptr;
    std::size_t exact_mask_seq_stride = 0, exact_mask_token_stride = 0;

    bool causal = false;                  ///< query token i of a sequence stands at cell n_kv - n_tokens + i and sees no later one
    int window = 0;                       ///< > 0: sees only so many cells, its own included; cells are taken for positions
    const std::uint16_t* mask = nullptr;  ///< fp16, added; -infinity hides
    std::size_t mask_seq_stride = 0, mask_token_stride = 0, mask_head_stride = 0;  ///< in halves
    int mask_heads = 1;
    /// Of the masks, by summarize_mask for plan.n_kv and for exact_tiles tiles; or null. Not with masks of several heads.
    const std::uint8_t *mask_tiles = nullptr, *exact_mask_tiles = nullptr;
    int exact_tiles = 0;
    /// Exact rows are made by the launch that is the last before this one on the stream (keep_rows), and all else that this call reads by
    /// what that one waits for: the call may begin beside it, and only what reads exact rows waits (programmatic dependent launch, sm_90).
    bool beside_keeping = false;
    /// An event after which tiles of k and v hold what they should, or null: prefill waits for it only where it reads them, after exact rows
    /// and queries.
    void* codes_ready = nullptr;
    float scale = 1, logit_softcap = 0;
    float max_bias = 0;            ///< ALiBi: the mask's values times each head's slope, as in ggml; nothing without a mask
    const float* sinks = nullptr;  ///< [n_head] logits
    Term term;
    float* lse = nullptr;  ///< [seq][token][head]: log of the softmax's denominator
};

/// Enqueues the call on `stream`.
Status run_attention(const AttentionPlan& plan, const AttentionArgs& args, void* workspace, Stream stream);

inline constexpr int kMostNewRows = 32;
/// The rows that a step makes, which its queries see exactly.
struct NewRows {
    KeepRows keys, values;                ///< of the same tokens
    const std::uint16_t* mask = nullptr;  ///< fp16 [seq][token][keys.n]: what of them a query sees
    bool keep = true;                     ///< they are kept as keep_rows does; false: they were, only x is read
};
/// The same call as two launches: run_before_rows wants queries, and may be under way while the model makes the step's keys and values; its
/// exact_mask hides them. run_with_rows, after both, attends to them where they were made, finishes, and keeps them.
/// can_split: whether that is for this call; not for head sizes that are no powers of two, for more than 32 rows, or for prefill.
bool can_split(const AttentionPlan& plan, const AttentionArgs& args, const KeepRows& keys, const KeepRows& values);
Status run_before_rows(const AttentionPlan& plan, const AttentionArgs& args, void* workspace, Stream stream);
Status run_with_rows(const AttentionPlan& plan, const AttentionArgs& args, const NewRows& rows, void* workspace, Stream stream);

}  // namespace turboquant::cuda
