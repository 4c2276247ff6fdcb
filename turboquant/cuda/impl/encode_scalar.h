// Scalar formats: rotation, norm, Lloyd-Max codes, scale; one block per (group of tokens, head). codec/quantizer.h's Algorithm 1.
#pragma once

#include "turboquant/cuda/impl/batch.h"
#include "turboquant/cuda/impl/cells.h"
#include "turboquant/cuda/impl/pack.h"
#include "turboquant/cuda/impl/rotate.h"

namespace turboquant::cuda {

inline constexpr int kScalarThreads = 128;

struct ScalarShared {
    BlockTokens tokens;
    std::uint32_t present[2];
    float levels[256];
    QuantizerCell cells[1];  ///< n_cells of them, then the stage, then the image of a tile

    TQ_DEVICE static int stage_at(int n_cells) {
        return (static_cast<int>(offsetof(ScalarShared, cells)) + n_cells * static_cast<int>(sizeof(QuantizerCell)) + 15) / 16 * 16;
    }
};

/// Bytes of shared memory that a block needs.
constexpr std::size_t scalar_shared_bytes(int head_dim, int bits, int n_cells) {
    return (offsetof(ScalarShared, cells) + n_cells * sizeof(QuantizerCell) + 15) / 16 * 16 + Stage::bytes(head_dim) +
           static_cast<std::size_t>(kTileKeys) * head_dim * bits / 8;
}

template <int tiles>
TQ_DEVICE void encode_scalar(const EncodeCall& a, int block, int head, const Thread thread, std::uint8_t* shared_bytes) {
    constexpr int kVectors = tiles <= 2 ? 2 : 1;  // of a warp at once
    const FormatTables& f = *a.heads[head].tables;
    if (f.family != Family::scalar) return;
    auto& shared = *reinterpret_cast<ScalarShared*>(shared_bytes);
    std::uint8_t* const stage_bytes = shared_bytes + ScalarShared::stage_at(f.n_cells);
    std::uint8_t* const image = stage_bytes + Stage::bytes(f.head_dim);
    const int lane = thread.lane();
    const Stage stage(f, a.side);

    shared.tokens.load(a, block, thread);
    for (int i = thread.index; i < f.n_cells; i += thread.count) shared.cells[i] = f.cells[i];
    for (int i = thread.index; i < 2 * f.half; i += thread.count) shared.levels[i] = f.levels[i];
    const Rotator<tiles> rotate(f, lane);
    int of_dim[tiles][4];
#pragma unroll
    for (int c = 0; c < tiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int d = Rotator<tiles>::dim(lane, c, i);
            of_dim[c][i] = d < f.head_dim ? stage.of_dim(a.side, d) : -1;
        }
    sync_block();

    const int scales_at = kTileKeys * f.head_dim * f.bits / 8, head_dim = f.head_dim;
    const float unit_scale = f.unit_scale;
    const float per_unit = f.cells_per_unit, last = static_cast<float>(f.n_cells - 1);
    const std::uint32_t all_ones = 2 * f.half - 1;
    const auto* cells = reinterpret_cast<const std::uint8_t*>(shared.cells);
    const auto* levels = reinterpret_cast<const std::uint8_t*>(shared.levels);
    std::uint64_t pending = ballot64(lane, [&](int i) { return shared.tokens.tile[i] >= 0; });
    while (pending) {
        const int tile_index = shared.tokens.tile[first_bit(pending)];
        const std::uint64_t members = pending & ballot64(lane, [&](int i) { return shared.tokens.tile[i] == tile_index; });
        pending &= ~members;
        std::uint8_t* const tile = a.tiles + a.heads[head].at + static_cast<std::size_t>(tile_index) * a.tile_stride;
        if (thread.index < 2) shared.present[thread.index] = 0;
        if (thread.warp() == 0) {
            sync_warp();
            for (int i = lane; i < 64; i += 32)
                if (members >> i & 1) {
                    shared.tokens.list[popc(members & ((std::uint64_t{1} << i) - 1))] = i;
                    atomic_or(&shared.present[shared.tokens.slot[i] >> 5], 1u << (shared.tokens.slot[i] & 31));
                }
        }
        sync_block();
        const int count = popc(members);
        for (int begin = thread.warp() * kVectors; begin < count; begin += thread.warps() * kVectors) {
            float x[kVectors][tiles][4];
            int slot[kVectors], token[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int i = shared.tokens.list[begin + v < count ? begin + v : begin];
                slot[v] = static_cast<int>(shared.tokens.slot[i]), token[v] = shared.tokens.token[i];
            }
            load_vectors<tiles, kVectors>(a, head_dim, head, token, lane, x);
            // Step by step for all vectors of the warp, without branches in between: their latencies overlap.
            float square[kVectors], cc[kVectors], yc[kVectors], acc[kVectors][tiles][4];
            Norm norm[kVectors];
            bool common = true;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) square[v] = square_of<tiles>(x[v]);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) square[v] = warp_sum(square[v]), common &= common_square(square[v]);
            if (common) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) norm[v] = norm_of(square[v], 1);
            } else {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) norm[v] = measure_norm<tiles>(x[v], square[v], a.not_finite);
            }
#pragma unroll
            for (int v = 0; v < kVectors; ++v) rotate(f, lane, x[v], norm[v].to_norm, acc[v]);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                std::uint8_t* const to = stage_bytes + stage.of_slot(a.side, slot[v]);
                cc[v] = yc[v] = 0;
#pragma unroll
                for (int c = 0; c < tiles; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float y = acc[v][c][i] * unit_scale, t = fabsf(y);
                        const auto& cell = *reinterpret_cast<const QuantizerCell*>(cells + cell_offset(t * per_unit, last));
                        const std::uint32_t code = cell.below + (t >= cell.bound ? 4 : 0);
                        const bool used = of_dim[c][i] >= 0;
                        const float level = used ? *reinterpret_cast<const float*>(levels + code) : 0;
                        const bool negative = (float_bits(y) >> 31 ^ (rotate.signs_out >> (4 * c + i) & 1)) != 0;
                        cc[v] = fmaf(level, level, cc[v]), yc[v] = fmaf(level, t, yc[v]);
                        if (used) to[of_dim[c][i]] = static_cast<std::uint8_t>(code >> 2 ^ (negative ? all_ones : 0));
                    }
            }
            // A half of the warp is a vector's.
            const float cc_sum = warp_sums<kVectors>(lane, cc), yc_sum = warp_sums<kVectors>(lane, yc);
            constexpr int kShare = 32 / kVectors, kLast = kVectors - 1;
            const bool is_last = lane >= kShare * kLast;
            const Norm my_norm{is_last ? norm[kLast].norm : norm[0].norm, is_last ? norm[kLast].unit : norm[0].unit, 0};
            const int my_slot = is_last ? slot[kLast] : slot[0];
            if (lane % kShare == 0 && begin + lane / kShare < count)
                *reinterpret_cast<std::uint16_t*>(tile + scales_at + scale_at(my_slot)) =
                    stored_scale(my_norm, a.norm_mode, cc_sum, yc_sum);
        }
        sync_block();
        write_tile(f, a.side, thread, stage_bytes, image, shared.present[0] | static_cast<std::uint64_t>(shared.present[1]) << 32, tile);
        if (pending) sync_block();
    }
}

/// `raw`: fp16 as it is. One warp per vector; a vector that is not finite becomes zero.
TQ_DEVICE void encode_raw(const EncodeCall& a, int token, int head, const Thread thread) {
    const FormatTables& f = *a.heads[head].tables;
    if (f.family != Family::raw || token >= a.n || a.cells[token] < 0) return;
    constexpr int kTiles = (kMaxHeadDim + 127) / 128;
    const int lane = thread.lane(), slot = static_cast<int>(a.cells[token] % kTileKeys), n_words = 16 * f.rows;
    std::uint8_t* const tile = a.tiles + a.heads[head].at + static_cast<std::size_t>(a.cells[token] / kTileKeys) * a.tile_stride;
    const int tokens[1] = {token};
    float all[1][kTiles][4];
    load_vectors<kTiles, 1>(a, f.head_dim, head, tokens, lane, all);
    auto& x = all[0];
    bool finite = true;
#pragma unroll
    for (int c = 0; c < kTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) finite &= fabsf(x[c][i]) <= 3.4028234e38f;
    const bool good = ballot(!finite) == 0;
    if (!good && lane == 0) atomic_or(a.not_finite, 1);
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
        const int dim = 128 * c + 16 * (lane / 4) + 4 * (lane % 4);
        if (dim >= f.head_dim) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const FragmentBit b = fragment_bit(FragmentFormat{Family::raw, 16}, a.side, f.head_dim, slot, dim + i, 0);
            *reinterpret_cast<std::uint16_t*>(tile + fragment_word_offset(n_words, b.lane, b.word) + b.shift / 8) =
                good ? half_bits(x[c][i]) : 0;
        }
    }
}

}  // namespace turboquant::cuda
