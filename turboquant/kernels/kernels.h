// CPU kernels with run-time dispatch. Raw pointers and plain structs; nothing of ggml. The library starts no thread: work is split by the
// caller into `n_threads` parts (plan), each part is run by `run_attention(plan, ..., ith)` on whatever thread the caller has, with a
// barrier before `merge_attention` (FlashInfer's plan/run split).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "turboquant/attention/attention.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/tile.h"

namespace turboquant {

/// Instruction-set levels, weakest first. `scalar` is always there.
enum class SimdLevel : std::uint8_t { scalar, neon, avx2, avx512 };  // avx512: F, BW, VL, DQ, VBMI, VNNI

std::string_view simd_level_name(SimdLevel level);
/// Levels compiled into this library and usable on this machine, weakest first.
std::span<const SimdLevel> available_simd_levels();
std::span<const SimdLevel> compiled_simd_levels();
std::optional<SimdLevel> find_simd_level(std::string_view name);

/// Kernels of one level. Obtained once, then passed around: there is no global switch, so two levels can be compared in one process.
struct Kernels;
/// Best available level, or exactly the level asked for. Throws std::invalid_argument naming the available levels if it is not available.
const Kernels& kernels();
const Kernels& kernels(SimdLevel level);
/// The level whose code actually runs, reported by that code itself (compiled into its translation unit).
SimdLevel kernels_level(const Kernels& k);

/// A rotation of pairs of values: (first + 2i, first + 2i+1) if adjacent, else (first + i, first + i + n_dims/2), i < n_dims/2.
struct PairTurn {
    int first = 0, n_dims = 0;
    bool adjacent = true;
};

/// A batch of vectors to encode into tile slots of one head.
struct EncodeArgs {
    TileShape shape;
    std::uint8_t* tiles = nullptr;        ///< tile 0 of this head
    std::size_t tile_stride = 0;          ///< bytes between successive tiles
    const float* x = nullptr;             ///< x[i*x_stride + d]: vector i, model's space
    std::size_t x_stride = 0;             ///< in floats
    const std::int64_t* cells = nullptr;  ///< destination cell of each vector: tile cells[i]/64, slot cells[i]%64
    int n = 0;
    NormMode norm_mode = NormMode::corrected;
    /// Key offset removal, or null: what is encoded is x[d] - (offset[d] * turn[d] + offset[head_dim + d] * turn[head_dim + d]) with turn =
    /// turns + i*2*head_dim and offset = offsets[i] + offset_at. Nothing is removed where offsets[i] is null.
    const float* turns = nullptr;
    const float* const* offsets = nullptr;
    std::size_t offset_at = 0;
};

/// Encodes the batch. Returns false if a vector holds a non-finite value (that slot is then written as zero, the others normally).
/// Safe to call concurrently for different heads (different tiles); not for the same head.
bool encode(const Kernels& k, const EncodeArgs& args);

/// What the codes that encode() just wrote of this batch leave of its vectors, into rows[i] (codec/residual.h; null: not of this one); zero
/// where a vector was not finite. Of rotated codecs. Concurrently as encode().
void encode_residuals(const Kernels& k, const EncodeArgs& args, std::uint8_t* const* rows);

/// fp16 of n values, n a multiple of 16: to nearest, ties to even; beyond fp16 the largest.
void to_halves(const Kernels& k, const float* x, std::size_t n, std::uint16_t* out);

/// How a call is cut: blocks of query rows x chunks of cells, per KV head.
struct AttentionPlan {
    int n_threads = 1;
    int rows_per_block = 0;  ///< query rows (token x head-in-group) that share one decode of a tile
    int n_row_blocks = 0;    ///< per KV head
    int n_chunks = 1;        ///< the cells are cut so often; > 1 needs merge_attention
    int tiles_per_chunk = 0;
    std::size_t workspace_bytes = 0;  ///< for all threads together
};

/// The same for all levels. n_threads: parts of run_attention() and merge_attention() at most, at least 1.
AttentionPlan plan_attention(const AttentionArgs& args, int n_threads);
/// Part `ith` of plan.n_threads. `workspace`: plan.workspace_bytes, 64-byte aligned, shared by all parts.
void run_attention(const Kernels& k, const AttentionPlan& plan, const AttentionArgs& args, std::uint8_t* workspace, int ith);
/// After all parts have run; a no-op if plan.n_chunks == 1.
void merge_attention(const Kernels& k, const AttentionPlan& plan, const AttentionArgs& args, std::uint8_t* workspace, int ith);

/// Plan, run and merge on the calling thread: for tests and small uses.
void attention(const Kernels& k, const AttentionArgs& args);

}  // namespace turboquant
