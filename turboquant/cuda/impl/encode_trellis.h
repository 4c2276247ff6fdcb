// Trellis formats: rotation, costs of the four subsets, search, codes, scale. A warp searches 2*kPairs vectors of one head at once; the
// rotated vectors are not kept but formed again when the trellis bits are known: that costs less than the room.
#pragma once

#include "turboquant/cuda/impl/batch.h"
#include "turboquant/cuda/impl/cells.h"
#include "turboquant/cuda/impl/pack.h"
#include "turboquant/cuda/impl/rotate.h"
#include "turboquant/cuda/impl/trellis_search.h"

namespace turboquant::cuda {

inline constexpr int kTrellisLanes = 8;
inline constexpr int kTrellisVectors = 64 / kTrellisLanes;  // of a warp
inline constexpr int kTrellisCells = 128;

struct TrellisShared {
    BlockTokens tokens;
    std::uint32_t present[2];
    float levels[4 + 64 + 4];
    QuantizerCell cells[kTrellisCells];
};

/// Words of shared memory of one warp: histories [block][pair][lane], costs [value][pair][subset], trellis bits [vector]. Histories grow
/// into the costs of values that the second pass has left behind: they take twice the words of a value's costs.
struct TrellisRoom {
    int history_block, costs_at, bits_pitch, bits_at;

    static constexpr int kCostPitch = kTrellisVectors / 2 * 4;

    constexpr explicit TrellisRoom(int dim)
        : history_block(kTrellisVectors / 2 * 32),
          costs_at((dim / 2 > kTrellisOverlap ? dim / 2 : kTrellisOverlap) / 4 * history_block),
          bits_pitch((dim / 8 + 2 + 3) / 4),
          bits_at(costs_at + dim * kCostPitch) {
        // Block i of the second pass ends at (i + 1) * history_block, costs of the next begin at costs_at + 4 * (i + 1) * kCostPitch.
        static_assert(kTrellisVectors / 2 * 32 == 2 * 4 * kCostPitch);
    }
};

/// Bytes of shared memory of a block; the stage (pack.h) takes the place of costs and histories.
constexpr std::size_t trellis_shared_bytes(int head_dim, int warps) {
    const TrellisRoom room(head_dim);
    const std::size_t work = 4 * static_cast<std::size_t>(warps) * (room.bits_at);
    return (sizeof(TrellisShared) + 15) / 16 * 16 + (work > Stage::bytes(head_dim) ? work : Stage::bytes(head_dim)) +
           4 * static_cast<std::size_t>(warps) * kTrellisVectors * room.bits_pitch;
}

/// Level nearest to y: levels[n].
TQ_DEVICE int nearest_level(const TrellisShared& s, float y, float per_unit, float middle, float last) {
    const std::uint32_t at = cell_offset(fmaxf(fmaf(y, per_unit, middle), 0.f), last);
    const auto& cell = *reinterpret_cast<const QuantizerCell*>(reinterpret_cast<const std::uint8_t*>(s.cells) + at);
    return static_cast<int>(cell.below >> 2) + (y >= cell.bound);
}

/// Costs of the subsets 0..3, a byte each.
TQ_DEVICE std::uint32_t subset_costs(const TrellisShared& s, float y, float per_unit, float middle, float last, float cost_scale) {
    const int n = nearest_level(s, y, per_unit, middle, last);
    const float* level = s.levels + 4 + n;
    const float nearest = y - level[0], least = nearest * nearest;
    std::uint32_t costs = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
        const float d = fminf(fabsf(y - level[i]), fabsf(y - level[i - 4]));
        const float cost = fminf((d * d - least) * cost_scale, 255.f);
        costs |= (float_bits(cost + 12582912.f) & 255u) << 8 * i;  // to the nearest, ties to even
    }
    const int turn = 8 * (n & 3);
    return turn ? costs << turn | costs >> (32 - turn) : costs;
}

/// The trellis bits of a warp's vectors from their costs. One function for all head sizes: it is long.
TQ_DEVICE_CALL void search_pairs(int dim, int lane, const std::uint32_t* costs, std::uint32_t* histories, std::uint8_t* bits) {
    using Search = TrellisSearch<kTrellisLanes>;
    constexpr int kLaneWords = Search::kWords / 4;
    const TrellisRoom room(dim);
    const int pair = lane / kTrellisLanes, l = lane % kTrellisLanes, half = l & 1;
    const std::uint32_t* const my_costs = costs + 4 * pair;
    std::uint32_t* const pair_histories = histories + pair * 32;
    std::uint8_t* const string = bits + (2 * pair + half) * 4 * room.bits_pitch;
    const int start = (dim - kTrellisOverlap % dim) % dim;
    Search search;
    search.start_anywhere();
    search.run<false>(l, my_costs, TrellisRoom::kCostPitch, dim, start, 0, kTrellisOverlap, nullptr, 0);
    // The second half of pass 1, which leads back to the joint, then pass 2, from there to there.
#pragma unroll 1
    for (int pass = 1;; ++pass) {
        const int first = pass == 1 ? (start + kTrellisOverlap) % dim : 0, begin = pass == 1 ? kTrellisOverlap : 0;
        const int end = pass == 1 ? 2 * kTrellisOverlap : dim;
        search.run<true>(l, my_costs, TrellisRoom::kCostPitch, dim, first, begin, end, pair_histories + l * kLaneWords, room.history_block);
        sync_warp();
        if (pass == 2) break;
        int state_a, state_b;
        search.best(l, end, state_a, state_b);
        int state = half ? state_b : state_a;
        for (int i = kTrellisOverlap / 4; i-- > 0;)
            state = Search::back(pair_histories + i * room.history_block, kLaneWords, half, begin + 4 * (i + 1), state);
        state_a = shfl(state, pair * kTrellisLanes), state_b = shfl(state, pair * kTrellisLanes + 1);
        search.start_at(l, state_a, state_b);
        // The joint's state, kept where pass 2 finds it.
        if (l < 2) string[1] = static_cast<std::uint8_t>(state);
        sync_warp();
    }
    // Bit 8 + i of a vector's string is that of value i; before value 0 come those of the last 8.
    int state = string[1];
    sync_warp();
    for (int i = dim / 4; i > 0; i -= 2) {
        std::uint32_t byte = reverse_bits(state) >> 28 << 4;
        state = Search::back(pair_histories + (i - 1) * room.history_block, kLaneWords, half, 4 * i, state);
        byte |= reverse_bits(state) >> 28;
        state = Search::back(pair_histories + (i - 2) * room.history_block, kLaneWords, half, 4 * (i - 1), state);
        if (l < 2) {
            string[i / 2] = static_cast<std::uint8_t>(byte);
            if (i == dim / 4) string[0] = static_cast<std::uint8_t>(byte);
        }
    }
    sync_warp();
}

template <int tiles>
TQ_DEVICE void encode_trellis(const EncodeCall& a, int block, int head, const Thread thread, std::uint8_t* shared_bytes) {
    using Search = TrellisSearch<kTrellisLanes>;
    constexpr int kPairs = Search::kPairs;
    const FormatTables& f = *a.heads[head].tables;
    if (f.family != Family::trellis) return;
    const int dim = f.head_dim, lane = thread.lane(), warp = thread.warp(), n_levels = 2 << f.bits;
    const TrellisRoom room(dim);
    auto& shared = *reinterpret_cast<TrellisShared*>(shared_bytes);
    std::uint8_t* const work = shared_bytes + (sizeof(TrellisShared) + 15) / 16 * 16;
    const std::size_t all_work = 4 * static_cast<std::size_t>(thread.warps()) * room.bits_at;
    auto* const histories = reinterpret_cast<std::uint32_t*>(work) + static_cast<std::size_t>(warp) * room.bits_at;
    std::uint32_t* const costs = histories + room.costs_at;
    std::uint8_t* const bits = work + (all_work > Stage::bytes(dim) ? all_work : Stage::bytes(dim)) +
                               4 * static_cast<std::size_t>(warp) * kTrellisVectors * room.bits_pitch;
    const int bits_pitch = 4 * room.bits_pitch;

    shared.tokens.load(a, block, thread);
    for (int i = thread.index; i < f.n_cells; i += thread.count) shared.cells[i] = f.cells[i];
    for (int i = thread.index; i < n_levels + 8; i += thread.count) shared.levels[i] = f.levels[i];
    const Rotator<tiles> rotate(f, lane);
    const CodecId codec = f.codec;
    const int code_bits = f.bits;
    const float unit_scale = f.unit_scale, cost_scale = f.cost_scale;
    const float per_unit = f.cells_per_unit, middle = static_cast<float>(f.n_cells / 2), last = static_cast<float>(f.n_cells - 1);
    sync_block();

    // Rotated coordinates c, i of the vectors at `index` of the block and after it; zeros where there is none.
    const auto rotated = [&](int index, float(&acc)[2][tiles][4], Norm(&norm)[2], std::uint32_t* not_finite) {
        float x[2][tiles][4], square[2];
        const int token[2] = {shared.tokens.tile[index] < 0 ? -1 : shared.tokens.token[index],
                              shared.tokens.tile[index + 1] < 0 ? -1 : shared.tokens.token[index + 1]};
        load_vectors<tiles, 2>(a, dim, head, token, lane, x);
#pragma unroll
        for (int v = 0; v < 2; ++v) square[v] = warp_sum(square_of<tiles>(x[v]));
        if (common_square(square[0]) && common_square(square[1])) {
            norm[0] = norm_of(square[0], 1), norm[1] = norm_of(square[1], 1);
        } else {
#pragma unroll
            for (int v = 0; v < 2; ++v) norm[v] = measure_norm<tiles>(x[v], square[v], not_finite);
        }
#pragma unroll
        for (int v = 0; v < 2; ++v) rotate(f, lane, x[v], norm[v].to_norm, acc[v]);
#pragma unroll
        for (int v = 0; v < 2; ++v)
#pragma unroll
            for (int c = 0; c < tiles; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[v][c][i] = flip(acc[v][c][i] * unit_scale, rotate.signs_out >> (4 * c + i));
    };

    for (int pair = 0; pair < kPairs; ++pair) {
        const int index = warp * kTrellisVectors + 2 * pair;
        if (shared.tokens.tile[index] < 0 && shared.tokens.tile[index + 1] < 0) continue;
        float y[2][tiles][4];
        Norm norm[2];
        rotated(index, y, norm, a.not_finite);
#pragma unroll
        for (int c = 0; c < tiles; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int d = Rotator<tiles>::dim(lane, c, i);
                if (d >= dim) continue;
                const std::uint32_t low = subset_costs(shared, y[0][c][i], per_unit, middle, last, cost_scale);
                const std::uint32_t high = subset_costs(shared, y[1][c][i], per_unit, middle, last, cost_scale);
                std::uint32_t words[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) words[k] = (byte_perm(low, high, 0x4400u + 0x1111u * k) & 0x00ff00ffu) << 4;
                store_words(costs + TrellisRoom::kCostPitch * d + 4 * pair, words);
            }
    }
    sync_warp();

    if (ballot(shared.tokens.tile[warp * kTrellisVectors + lane % kTrellisVectors] >= 0)) search_pairs(dim, lane, costs, histories, bits);

    const Stage stage(f, a.side);
    std::uint64_t pending = ballot64(lane, [&](int i) { return shared.tokens.tile[i] >= 0; });
    while (pending) {
        const int tile_index = shared.tokens.tile[first_bit(pending)];
        const std::uint64_t members = pending & ballot64(lane, [&](int i) { return shared.tokens.tile[i] == tile_index; });
        pending &= ~members;
        std::uint8_t* const tile = a.tiles + a.heads[head].at + static_cast<std::size_t>(tile_index) * a.tile_stride;
        sync_block();  // costs and histories are done with, or the tile before
        if (thread.index < 2) shared.present[thread.index] = 0;
        sync_block();
        for (int v = 0; v < kTrellisVectors; v += 2) {
            const int index = warp * kTrellisVectors + v;
            if (!(members >> index & 3)) continue;
            float y[2][tiles][4], cc[2], yc[2];
            Norm norm[2];
            rotated(index, y, norm, a.not_finite);
#pragma unroll
            for (int w = 0; w < 2; ++w) {
                const bool member = members >> (index + w) & 1;
                std::uint8_t* const to = work + stage.of_slot(a.side, static_cast<int>(shared.tokens.slot[index + w]));
                const std::uint8_t* const string = bits + (v + w) * bits_pitch;
                cc[w] = yc[w] = 0;
#pragma unroll
                for (int c = 0; c < tiles; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int d = Rotator<tiles>::dim(lane, c, i);
                        if (d >= dim) continue;
                        // Window, the newest bit on top: parities with the polynomials turned round.
                        const std::uint32_t window =
                            (string[(d + 1) / 8] | static_cast<std::uint32_t>(string[(d + 1) / 8 + 1]) << 8) >> (d + 1) % 8 & 255u;
                        const int subset =
                            2 * (popc(window & reverse_bits(kTrellisH0) >> 24) & 1) + (popc(window & reverse_bits(kTrellisH1) >> 24) & 1);
                        const float value = y[w][c][i];
                        const int n = nearest_level(shared, value, per_unit, middle, last), above = n + ((subset - n) & 3);
                        const float high = shared.levels[4 + above], low = shared.levels[above];
                        const bool is_high = fabsf(value - high) < fabsf(value - low);
                        const float level = is_high ? high : low;
                        cc[w] = fmaf(level, level, cc[w]), yc[w] = fmaf(level, value, yc[w]);
                        const std::uint32_t code =
                            static_cast<std::uint32_t>((is_high ? above : above - 4) >> 2) | window >> 7 << (code_bits - 1);
                        if (member) to[stage.of_dim(a.side, d)] = static_cast<std::uint8_t>(fragment_code(codec, code));
                    }
            }
#pragma unroll
            for (int w = 0; w < 2; ++w) cc[w] = warp_sum(cc[w]), yc[w] = warp_sum(yc[w]);
#pragma unroll
            for (int w = 0; w < 2; ++w)
                if (lane == w && (members >> (index + w) & 1)) {
                    const int slot = static_cast<int>(shared.tokens.slot[index + w]);
                    atomic_or(&shared.present[slot >> 5], 1u << (slot & 31));
                    *reinterpret_cast<std::uint16_t*>(tile + kTileKeys * dim * code_bits / 8 + scale_at(slot)) =
                        stored_scale(norm[w], a.norm_mode, cc[w], yc[w]);
                }
        }
        sync_block();
        write_tile(f, a.side, thread, work, nullptr, shared.present[0] | static_cast<std::uint64_t>(shared.present[1]) << 32, tile);
    }
}

}  // namespace turboquant::cuda
