// Keys of a panel, decoded, become wide: levels times scales plus the offset at the cells' positions, in units of the format's step, in two
// planes of bytes.
#pragma once

#include <type_traits>

#include "turboquant/cuda/impl/operand_bytes.cuh"
#include "turboquant/cuda/impl/rotate.cuh"
#include "turboquant/cuda/impl/row_group.cuh"
#include "turboquant/cuda/impl/term.cuh"

namespace turboquant::cuda {

inline constexpr int kWideWarps = 8;
constexpr int panel_warps(bool wide) { return wide ? kWideWarps : 4; }

/// What widens the keys of a panel: made before they are decoded, run afterwards by all warps, which have the same number of rows each.
/// Several rows of a warp at once. The offset at a position is the sum over frequencies of a cosine and a sine times what a lane holds of
/// the offset; cosines and sines of the rows at hand lie in shared memory, each made once.
template <int D>
struct WideKeys {
    using Group = RowGroup<D>;
    // Places such that the lanes of a warp read different banks, of both orders of pairs (term.cuh).
    static constexpr int kStride = D / 2 + 9;
    static constexpr int kWarpBytes = Group::kRows * kStride * 8, kBytes = kWideWarps * kWarpBytes;
    static constexpr int kWarpRows = kPanelKeys / kWideWarps;
    __device__ __forceinline__ static int place(int row, int f) { return row * kStride + f + (f >= D / 4 ? 8 : 0); }

    const PrefillParams& p;
    const TermParams& term;
    const Group group;
    const int warp, lane, head;
    float2* const turns;
    bool trellis;
    float inverse_step;
    int pos, id;                 ///< of row lane % kWarpRows of the warp: its position or -1, its offset
    int term_id = -1;            ///< the offset that there is in cosine and sine
    float cosine[16], sine[16];  ///< factors of these for the lane's dims, signs and units included
    uint32_t places[8];          ///< of the dims' frequencies, two a word
    uint32_t flips = 0;          ///< dims whose sign the rotation changes at its end

    /// Loads what does not wait for the keys' codes.
    __device__ __forceinline__ WideKeys(const PrefillParams& params, int seq, int kv_head, int panel, int n_kv, int warp_of_block, int lane_of_warp, uint8_t* shared)
        : p(params), term(params.a.term), group(lane_of_warp), warp(warp_of_block), lane(lane_of_warp), head(kv_head), turns(reinterpret_cast<float2*>(shared + warp_of_block * kWarpBytes)) {
        const int format = HeadTilesAt(p.a.k, seq, head).format, own = kWarpRows * warp + lane % kWarpRows,
                  cell = panel * kPanelKeys + own / kTileKeys * kTileKeys + cell_of_position(own % kTileKeys);
        const std::size_t at = seq * term.cell_seq_stride + cell;
        trellis = is_trellis_index(format), inverse_step = 1 / p.a.table[format].step;
        pos = term.n_freq > 0 && cell < n_kv ? term.cell_pos[at] : -1, id = pos >= 0 && term.cell_term ? term.cell_term[at] : 0;
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const int f = term.n_freq > 0 ? __ldg(term.dim_freq + group.dim(e)) : 0;
            const uint32_t to = f < term.n_freq ? place(group.row, f) : 0;
            places[e / 2] = e % 2 ? places[e / 2] | to << 16 : to;
            flips |= (p.a.signs_out[group.dim(e)] < 0 ? 1u : 0u) << e;
        }
        take_offset(__shfl_sync(~0u, id, 0));
    }

    /// Of one of the offsets.
    __device__ __forceinline__ void take_offset(int offset_id) {
        const float* offset = term.offset + (static_cast<std::size_t>(offset_id) * p.a.n_head_kv + head) * 2 * D;
        const float unit = inverse_step * rsqrtf(static_cast<float>(D));
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const int dim = group.dim(e);
            const bool turns_with_position = term.n_freq > 0 && __ldg(term.dim_freq + dim) < term.n_freq;
            const float by = p.a.signs_in[dim] * unit;
            cosine[e] = turns_with_position ? __ldg(offset + dim) * by : 0, sine[e] = turns_with_position ? __ldg(offset + D + dim) * by : 0;
        }
        term_id = offset_id;
    }

    /// Cosines and sines of the rows' positions, of lanes from `first` on; of no position: none. All loads before the first use.
    __device__ __forceinline__ void make_turns(int pos_of_lane, int first) const {
        constexpr int kEach = (D / 2 + 31) / 32;
        int pos[Group::kRows];
        float2 unit[Group::kRows][kEach], by[Group::kRows][kEach];
#pragma unroll
        for (int r = 0; r < Group::kRows; ++r) {
            pos[r] = __shfl_sync(~0u, pos_of_lane, first + r);
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int f = max(0, min(lane + 32 * i, term.n_freq - 1)), at = max(0, pos[r]);
                unit[r][i] = __ldg(term.turns + (at & 63) * term.n_pad + f);
                by[r][i] = __ldg(term.turns + static_cast<std::size_t>(kTurnRows + (at >> 6)) * term.n_pad + f);
            }
        }
        __syncwarp();
#pragma unroll
        for (int r = 0; r < Group::kRows; ++r)
#pragma unroll
            for (int i = 0; i < kEach; ++i) {  // turn_at, in two parts
                const float2 a = unit[r][i], b = by[r][i];
                turns[place(r, lane + 32 * i)] = pos[r] >= 0 ? make_float2(a.x * b.x - a.y * b.y, a.y * b.x + a.x * b.y) : make_float2(0, 0);
            }
        __syncwarp();
    }

    /// Row `row` of the panel, of the lane's group.
    __device__ __forceinline__ void widen(int row, uint8_t* keys, float* scales) const {
        float x[16];
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const float2 turn = turns[e % 2 ? places[e / 2] >> 16 : places[e / 2] & 0xffff];
            x[e] = term.n_freq > 0 ? fmaf(cosine[e], turn.x, sine[e] * turn.y) : 0;
        }
        group.butterflies(x);
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = *reinterpret_cast<const uint32_t*>(keys + swizzled(row, group.word(i, trellis)));
        if (trellis) transpose_bytes(w);
        const float scale = scales[row];
#pragma unroll
        for (int e = 0; e < 16; ++e) {
            const float level = static_cast<float>(static_cast<int8_t>(w[e / 4] >> e % 4 * 8));
            x[e] = fmaf(level, scale, __uint_as_float(__float_as_uint(x[e]) ^ (flips << (31 - e) & 0x80000000u)));
        }
        const float top = group.largest(x);
        uint32_t low[4];
        split_bytes(x, top > 0 ? kPrefillTop / top : 0, w, low);
        if (trellis) transpose_bytes(w), transpose_bytes(low);
#pragma unroll
        for (int i = 0; i < 4; ++i) put_word(keys, row, group.word(i, trellis), w[i]), put_word(keys + kKeyPlane, row, group.word(i, trellis), low[i]);
        if (group.lane == 0) scales[row] = top * (256 / kPrefillTop);  // the kernel's scores are in units of 256
    }

    /// All rows of a warp, whose positions were loaded before.
    __device__ __forceinline__ void run(uint8_t* keys, float* scales) {
#pragma unroll 1
        for (int i = 0; i < kWarpRows; i += Group::kRows) {
            if (term.n_freq > 0) make_turns(pos, i);
            const int id_of_row = __shfl_sync(~0u, id, i + group.row);
            if (__any_sync(~0u, id_of_row != term_id)) take_offset(id_of_row);
            widen(kWarpRows * warp + i + group.row, keys, scales);
        }
    }
};

/// Row by row, for head sizes that are not powers of two.
template <int D>
    requires(D != 64 && D != 128)
struct WideKeys<D> {
    static constexpr int kBytes = kWideWarps * D * 4;
    const PrefillParams& p;
    const int seq, head, panel, n_kv, warp, lane;
    float* const x;  ///< D floats of a warp's own

    __device__ __forceinline__ WideKeys(const PrefillParams& params, int sequence, int kv_head, int panel_of_keys, int cells, int warp_of_block, int lane_of_warp, uint8_t* shared)
        : p(params), seq(sequence), head(kv_head), panel(panel_of_keys), n_kv(cells), warp(warp_of_block), lane(lane_of_warp), x(reinterpret_cast<float*>(shared) + warp_of_block * D) {}

    __device__ __forceinline__ void run(uint8_t* keys, float* scales) const {
        constexpr int kEach = (D + 31) / 32;
        const TermParams& term = p.a.term;
        const int format = HeadTilesAt(p.a.k, seq, head).format;
        const float inverse_step = 1 / p.a.table[format].step;
        const bool trellis = is_trellis_index(format);
#pragma unroll 1
        for (int row = kPanelKeys / kWideWarps * warp; row < kPanelKeys / kWideWarps * (warp + 1); ++row) {
            const int cell = panel * kPanelKeys + row / kTileKeys * kTileKeys + cell_of_position(row % kTileKeys);
            const std::size_t at = seq * term.cell_seq_stride + cell;
            const int pos = term.n_freq > 0 && cell < n_kv ? term.cell_pos[at] : -1;
            if (pos >= 0) {
                const float* offset = term.offset + (static_cast<std::size_t>(term.cell_term ? term.cell_term[at] : 0) * p.a.n_head_kv + head) * 2 * D;
                float v[kEach];
#pragma unroll
                for (int i = 0; i < kEach; ++i) {
                    const int dim = lane + 32 * i, f = dim < D ? __ldg(term.dim_freq + dim) : 255;
                    v[i] = 0;
                    if (f >= term.n_freq) continue;
                    const auto [c, s] = turn_at(term, pos, f);
                    v[i] = fmaf(__ldg(offset + dim), c, __ldg(offset + D + dim) * s);
                }
#pragma unroll
                for (int i = 0; i < kEach; ++i)
                    if (D % 32 == 0 || lane + 32 * i < D) x[lane + 32 * i] = v[i];
                __syncwarp();
                rotate_row<D>(x, lane, p.a.signs_in, p.a.signs_out, p.a.hartley);
            }
            float w[4] = {}, top = 0;
            if (lane < D / 4) {
                const uint32_t levels = *reinterpret_cast<const uint32_t*>(keys + swizzled(row, lane));
                const float scale = scales[row];
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    w[b] = static_cast<float>(static_cast<int8_t>(levels >> 8 * b)) * scale;
                    if (pos >= 0) w[b] = fmaf(x[dim_of<D>(lane, b, trellis)], inverse_step, w[b]);
                    top = fmaxf(top, fabsf(w[b]));
                }
            }
#pragma unroll
            for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            const float f = top > 0 ? kPrefillTop / top : 0;
            WordPair out;
#pragma unroll
            for (int b = 0; b < 4; ++b) out.put(b, __float2int_rn(w[b] * f));
            put_word(keys, row, lane, out.high), put_word(keys + kKeyPlane, row, lane, out.low);
            __syncwarp();
            if (lane == 0) scales[row] = top * (256 / kPrefillTop);  // the kernel's scores are in units of 256
        }
    }
};

/// Calls without a term.
struct NarrowKeys {
    template <class... Args>
    __device__ __forceinline__ explicit NarrowKeys(Args&&...) {}
};
template <int D, bool kWide>
using PanelKeys = std::conditional_t<kWide, WideKeys<D>, NarrowKeys>;

}  // namespace turboquant::cuda
