// Between the dispatcher and the translation units of the levels: the table of entry points and the work they are handed. Plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "turboquant/attention/turns.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/kernels/tables.h"

namespace turboquant {

/// Where the score term's parts lie in a thread's scratch (impl/score_term.h), in floats from AttentionCall::term on.
struct TermLayout {
    int n_pad;                         // n_freq rounded up to whole vectors
    std::size_t query, query_stride;   // [n_terms][rows][2*n_pad]; the stride between terms
    std::size_t turned_a, turned_b;    // [rows][n_pad]
    std::size_t panel_cos, panel_sin;  // [n_pad][32]
    std::size_t place;                 // [2*n_pad]
    std::size_t out;                   // [rows][64]
    std::size_t even, odd;             // [rows][32]
    std::size_t end;
};

/// Floats in the widest vector, and bytes of what a query row carries from tile to tile (impl/softmax.h, Row): the levels assert them.
inline constexpr std::size_t kWidestVector = 16, kRowBytes = 64;
/// Residuals that are decoded at once: few enough to stay in the first-level cache.
inline constexpr int kResidualGroup = 8;

/// One attention call, cut. A *row* is (token, query head of the group): row = token*group + head in the group.
/// A *state* holds what flash attention keeps of `rows_per_block` rows: [m][l][acc rows x dim_v], m in units of log2.
struct AttentionCall {
    const AttentionArgs* args;
    const CodecTables *k, *v;  // of the unit's head
    int group, n_rows, rows_per_block;
    int dim_v;                                   // of the accumulator: head size of the values, or of the keys if v_is_k
    const CodecTables *k_residual, *v_residual;  // levels of residuals at these head sizes; null: there are none
    std::size_t state_floats;                    // between the states of successive chunks
    TermLayout term_at;
    // Offsets into a thread's scratch, in bytes.
    std::size_t q8, qf, rows, scores, term, weights, k_panel, v_panel, exact_list, residual, added, taken, state, exact_state;
};

/// One block of rows of one KV head against a range of tiles.
struct AttentionUnit {
    int kv_head, row_begin, n_rows, tile_begin, tile_end;
    const std::uint8_t *k_tiles, *v_tiles;  // tile 0 of this head
    bool* term_panels_built;                // of the thread's scratch, in this call
    float* exact_state;                     // of the exact rows, in the model's space; null: there are none, or another unit has them
};

/// Slots of one tile of one head, and their row forms (rows.h).
struct TileRows {
    TileShape shape;
    std::uint8_t* tile;
    const std::int64_t* cells;  // the slots are cells[i] % 64
    int n;
    std::uint8_t* rows;  // row i at rows + i*row_stride
    std::size_t row_stride;
};

/// Slots of one tile to be decoded; the rest as DecodedRows, of this head and these rows.
struct TileDecode {
    TileShape shape{};
    const std::uint8_t* tile = nullptr;
    const std::int64_t* cells = nullptr;
    int n = 0;
    float* x = nullptr;
    std::uint16_t* halves = nullptr;
    std::size_t stride = 0;
    const float* turns = nullptr;
    const float* const* offsets = nullptr;
    std::size_t offset_at = 0;
    const float* unscale = nullptr;
};

/// Slots of one tile to be rotated.
struct TileTurn {
    TileShape shape;
    std::uint8_t* tile;
    const std::int64_t* cells;
    int n;
    PairTurn pairs;
    const float* const* tables;
    NormMode norm_mode;
};

struct Kernels {
    SimdLevel (*level)();
    bool (*encode)(const EncodeArgs& args, const CodecTables& tables);
    void (*encode_residuals)(const EncodeArgs& args, std::uint8_t* const* rows, const CodecTables& tables, const CodecTables& residual);
    void (*to_halves)(const float* x, std::size_t n, std::uint16_t* out);
    void (*get_rows)(const TileRows& args, const CodecTables& tables);
    void (*set_rows)(const TileRows& args, const CodecTables& tables);
    void (*decode_rows)(const TileDecode& args, const CodecTables& tables);
    bool (*rotate_rows)(const TileTurn& args, const CodecTables& tables);
    /// Fills `state`, and the unit's exact_state if there is one.
    void (*attend)(const AttentionCall& call, const AttentionUnit& unit, std::uint8_t* scratch, float* state);
    /// Combines the states of n_chunks chunks and the exact rows' and writes output rows row_begin.. (absolute; the states' first row is
    /// unit.row_begin).
    void (*finish)(const AttentionCall& call, const AttentionUnit& unit, const float* states, int n_chunks, int first, int last);
};

extern const Kernels kKernelsScalar, kKernelsAvx2, kKernelsAvx512, kKernelsNeon;

}  // namespace turboquant
