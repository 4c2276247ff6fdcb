// Attention over a compressed cache: arguments, and the double-precision reference that defines the result.
//
//   out[t,h] = sum_j p_j v_j,  p = softmax_j( l_j ),
//   l_j = cap( scale * (q . k_j + e_j) ) + slope(h) * mask[t,j]      cap(x) = logit_softcap * tanh(x / logit_softcap), or x if it is 0
// with an optional sink logit per head that takes part in the softmax's denominator only, and an optional score term e_j (see ScoreTerm).
// Stored keys and values live in the rotated space: q is rotated once, the output is un-rotated once (<Rq, Rk> = <q, k>).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "turboquant/codec/tile.h"
#include "turboquant/spec/windows.h"

namespace turboquant {

/// What is particular to one KV head where heads differ in format.
struct HeadTiles {
    CodecId codec;
    std::size_t at;  ///< bytes from tile 0 of KV head 0 to tile 0 of this one
};

/// One side (keys or values) of one stream of the cache: tiles of all KV heads.
struct TileView {
    TileShape shape;                      ///< of all heads; of the first, if they differ
    const std::uint8_t* tiles = nullptr;  ///< tile 0 of KV head 0
    std::size_t head_stride = 0;          ///< bytes between the same tile of successive KV heads
    std::size_t tile_stride = 0;          ///< bytes between successive tiles of one KV head
    const HeadTiles* heads = nullptr;     ///< [n_head_kv], formats that mix (spec/head_codecs.h); null: all heads are as `shape` says

    TileShape head_shape(int head) const {
        return heads ? TileShape{heads[head].codec, shape.side, shape.head_dim, shape.n_outliers} : shape;
    }
    const std::uint8_t* head_tiles(int head) const {
        return tiles + (heads ? heads[head].at : static_cast<std::size_t>(head) * head_stride);
    }
};

/// A position-dependent term per key added to q.k_j before scaling: e_j = sum_i a_i cos(p_j w_i) + b_i sin(p_j w_i),
/// p_j the position of cell j, with a, b from q and the key offset mu (docs/cache.md). Absent in plain caches.
/// q's part is q_term: per query row, 2*n_freq floats, [a_0..a_{n-1}, b_0..b_{n-1}]; the table of rotations is shared by all heads and
/// layers.
struct ScoreTerm {
    int n_freq = 0;                           ///< 0: no term
    const float* q_term = nullptr;            ///< [n_terms][n_tokens][n_head][2*n_freq]
    const float* turns = nullptr;             ///< of the w_i (turns.h)
    const std::int32_t* cell_pos = nullptr;   ///< [n_kv]; negative: this cell has no term
    int n_terms = 1;                          ///< sequences of one cache have offsets of their own
    const std::uint8_t* cell_term = nullptr;  ///< [n_kv], < n_terms: which of q_term goes with a cell; null: 0
};

/// -infinity in fp16: what a mask holds where a cell is hidden.
inline constexpr std::uint16_t kMaskHidden = 0xfc00;

/// Other mask values for some tiles: cells that are attended over elsewhere are hidden there.
struct MaskPatch {
    const std::int16_t* tile = nullptr;     ///< [tiles]: number of the tile's patch, or -1; null: there are none
    const std::uint16_t* halves = nullptr;  ///< fp16 [patch][n_tokens][mask_heads][kTileKeys], cells beyond n_kv hidden
};

/// Cells that some queries see better than the tiles have them (WindowForm, spec/windows.h). Row i of the call lies in slot k_slots[i] of the
/// keys and v_slots[i] of the values.
///   halves    fp16 vectors in the model's space that are attended over beside the tiles, where these cells are hidden; summed in this order
///   residual  what the codes of cells[i] leave (codec/residual.h): it is added to them where a query wants the row; else they are seen as
///             they are, as the mask and the score term say
struct ExactRowsView {
    int n = 0;  ///< rows; 0: none
    WindowForm form = WindowForm::halves;
    const std::uint8_t *k = nullptr, *v = nullptr;  ///< slot 0
    std::size_t k_stride = 0, v_stride = 0;         ///< bytes between slots
    /// Bytes between heads, of residuals; of halves the heads of a slot lie one after the other.
    std::size_t k_head_stride = 0, v_head_stride = 0;
    const std::int32_t *k_slots = nullptr, *v_slots = nullptr;
    const std::int32_t* cells = nullptr;  ///< residual: ascending, each once, < n_kv
    const float* q = nullptr;             ///< halves: queries as AttentionArgs::q; those may be scaled for the keys in the tiles
    std::size_t q_token_stride = 0, q_head_stride = 0;
    /// fp16 [n_tokens][mask_heads][n]; null: all visible. Of residuals: where it is not hidden the row is wanted.
    const std::uint16_t* mask = nullptr;

    /// Rows that are attended over beside the tiles, and those that are added to them.
    bool beside() const { return n && form != WindowForm::residual; }
    bool on_top() const { return n && form == WindowForm::residual; }
};

/// One attention call over one stream: n_tokens query tokens against cells 0..n_kv-1.
struct AttentionArgs {
    int n_head = 0;     ///< query heads
    int n_head_kv = 0;  ///< KV heads; n_head % n_head_kv == 0, query head h reads KV head h / (n_head/n_head_kv)
    int n_tokens = 0;
    int n_kv = 0;  ///< cells to read; need not be a multiple of kTileKeys

    const float* q = nullptr;                               ///< q[t*q_token_stride + h*q_head_stride + i], i < head_dim of the keys
    std::size_t q_token_stride = 0, q_head_stride = 0;      ///< in floats
    float* out = nullptr;                                   ///< out[t*out_token_stride + h*out_head_stride + i], i < v_dim_out
    std::size_t out_token_stride = 0, out_head_stride = 0;  ///< in floats

    TileView k, v;
    /// Values are the first v_dim_out dims of the *keys* (MLA: V is a view of K): then v == k (same tiles, Side::key) and this is set.
    bool v_is_k = false;
    int v_dim_out = 0;  ///< values returned per head; v.shape.head_dim unless v_is_k

    const std::uint16_t* mask = nullptr;  ///< fp16, mask[t*mask_token_stride + (h % mask_heads)*mask_head_stride + j]; null: all visible
    std::size_t mask_token_stride = 0, mask_head_stride = 0;  ///< in halves
    int mask_heads = 1;
    MaskPatch patch;      ///< overrides the mask
    ExactRowsView exact;  ///< takes part in the softmax as cells do, but for the score term

    float scale = 1;
    float logit_softcap = 0;
    float max_bias = 0;            ///< ALiBi; slope(h) = 1 if 0 (see alibi_slope)
    const float* sinks = nullptr;  ///< [n_head] logits, or null

    ScoreTerm term;

    /// [n_tokens][n_head], or null: log of the softmax's denominator, sink included, -infinity where nothing is visible. Two results over
    /// disjoint cells are merged by it (FlashInfer, arXiv:2501.01005, eq. 3): see merge_results.
    float* lse = nullptr;
};

/// Merges the result `b` into `a` (out and lse): attention over the cells of both. Same queries, heads and output sizes; both have an lse.
/// Rows first..last-1 of the n_tokens*n_head rows.
void merge_results(const AttentionArgs& a, const AttentionArgs& b, int first, int last);

/// ALiBi slope of query head h (Press et al. 2021, as in ggml): with n2 = 2^floor(log2(n_head)),
/// h < n2: 2^(-max_bias*(h+1)/n2), else 2^(-(max_bias/2)*(2*(h-n2)+1)/n2). 1 if max_bias is 0.
float alibi_slope(float max_bias, int n_head, int h);

/// Says what is wrong with the arguments, or returns null if they are good (sizes, strides, null pointers, unsupported head_dim).
const char* check_attention_args(const AttentionArgs& a);

/// Levels that the reference decodes to: those of the codebook, or their int8 image (codec/codebook.h), where a format has one and it is
/// not exact: the scalar formats of up to 4 bits. Kernels that keep everything else exact are held against the second.
enum class ReferenceLevels : std::uint8_t { exact, int8 };

/// The definition, in double precision from the decoded tiles. A row whose every cell is masked returns zeros.
/// Throws std::invalid_argument with check_attention_args' text.
void reference_attention(const AttentionArgs& a, ReferenceLevels levels = ReferenceLevels::exact);

}  // namespace turboquant
