// Attention of a few query rows over compressed tiles: one block reads a range of one KV head's tiles, each warp every fourth of them, with
// plain 16-byte loads into registers (the next tile's keys while values are weighed, values while keys are scored). Blocks of one head
// leave partial results; the last of them to finish merges. Source of the split: FlashDecoding; of the merge: arXiv:2501.01005, eq. 3.
#pragma once

#include "turboquant/attention/attention.h"
#include "turboquant/cuda/impl/merge.cuh"
#include "turboquant/cuda/impl/products.cuh"
#include "turboquant/cuda/impl/queries.cuh"

namespace turboquant::cuda {

/// kFormat and kTerm: what the kernel is compiled for, KernelKind.
template <int D, int kGroups, int kFormat, bool kTerm>
struct Attend : Queries<D, kGroups> {
    static constexpr int kAhead = kernel_ahead(D);
    // Kernels of one format leave exact rows to that of raw (attend_kernel).
    static constexpr bool kMayBeExact = kFormat == kAnyFormat || kFormat == fragment_codec_index(CodecId::raw);
    using Base = Queries<D, kGroups>;
    using Base::p, Base::shared, Base::thread, Base::warp, Base::lane, Base::g, Base::t, Base::n, Base::kRows;
    using Base::item, Base::item_index, Base::kv_head, Base::row_block, Base::first_row, Base::n_kv, Base::exact, Base::tile_begin, Base::tile_end;
    using Side = TileStream<D, kFormat>;
    __device__ __forceinline__ explicit Attend(const Block<D, kGroups>& block) : Base(block) {}

    /// Sums of weighted values, largest logits and sums of weights of this warp; returns the factor of the former.
    __device__ __forceinline__ float run(float (&o)[kGroups][D / 8], float (&most)[kGroups], float (&sum)[kGroups]) {
        const SharedLayout l = shared_layout(D, kGroups, p.term.panel ? p.term.n_pad : 0, p.term.n_terms, 0);
        const Side k(exact ? p.exact_k : p.k, item.seq, kv_head), v(exact ? p.exact_v : p.v, item.seq, kv_head);
        const bool has_term = kTerm && !(kMayBeExact && exact);
        // Warps take tiles in turn; with a term, pairs of them, if there are enough for all. Strides are 4, 4, .. or 1, 7, 1, 7, ..
        const bool pairs = has_term && tile_end - tile_begin > kWarps;
        const int first = visible_from(tile_begin + (pairs ? 2 * warp : warp));
        TileMask tile_mask(*this);
        tile_mask.look_ahead(*this, first);
        int stride = pairs ? 1 : kWarps;
        const int32_t* tile_pos = p.term.tile_pos + item.seq * p.term.tile_seq_stride;
        const int pos_first = has_term && tile_begin < tile_end ? tile_pos[tile_begin] : -1;
        const int term_id = has_term && p.term.ids ? p.term.ids[item.seq * p.term.n_terms + min(lane, p.term.n_terms - 1)] : 0;
        Terms terms{TermLane(lane, p.term.n_pad)};
        if (has_term) terms.look_ahead(tile_pos, first, tile_end, lane);
        const uint8_t *k_tile = k.tiles + first * k.stride, *v_tile = v.tiles + first * v.stride;
        const unsigned k_stride = static_cast<unsigned>(k.stride), v_stride = static_cast<unsigned>(v.stride);
        Ahead<kAhead> keys, values;
        const auto load_first = [&] {
            if (first >= tile_end) return;
            keys.load(k, k_tile, lane);
            if (k.is_raw()) prefetch_tile(k_tile, k.code_bytes());
            prefetch_tile(v_tile, v.code_bytes());
        };
        const bool late = kMayBeExact && exact;
        if (!late) load_first();
        uint32_t* lut = reinterpret_cast<uint32_t*>(shared + l.lut);
        if (format_uses_lut(k.format))
#pragma unroll 1
            for (int i = thread; i < 256; i += 32 * kWarps) lut[i] = p.lut[k.format * 256 + i];
        if (format_uses_lut(v.format))
#pragma unroll 1
            for (int i = thread; i < 256; i += 32 * kWarps) lut[256 + i] = p.lut[v.format * 256 + i];
        const int first_pos = uniform(pos_first);
        if (has_term) this->touch_term(first_pos, term_id);
        this->make_rows(l, [&] {
            if (!has_term) return;
            terms.residue = this->make_term(l, first_pos, term_id);
            this->fetch_panel(l);  // not before that is read, which would wait behind it: all blocks fetch at once
        });
        __syncthreads();
        this->make_operands(l, k.format);
        if (kFormat != kAnyFormat && thread < 32) lut[thread] = p.table[k.format].prmt[thread & 7];
        if (has_term) this->wait_for_panel(l);
        __syncthreads();
        if (late) {
            wait_for_launch_before();  // all else was there before that began (AttentionArgs::beside_keeping)
            load_first();
        }
        QueryOperand<D, kGroups> q;
        q.shared = reinterpret_cast<const uint32_t*>(shared + l.operands) + lane;
        if (!k.is_raw()) q.load();

        // Look-ups from four copies: words that the compiler knows to be the same in all lanes it keeps in uniform registers, and moves them
        // to others before each use.
        uint32_t table[8];
        if constexpr (kFormat != kAnyFormat) {
#pragma unroll
            for (int i = 0; i < 8; ++i) table[i] = lut[8 * t + i];
        }
        const auto table_of = [&](int format) { return kFormat == kAnyFormat ? p.table[format].prmt : table; };

        // Factors of the lane's rows, t of each group: integer score * scale of the key * unit = logit in units of log2.
        float unit[kGroups];
        const uint16_t* mask = exact ? p.exact_mask : p.mask;
        const bool general = has_term || mask || p.softcap != 0;
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
            const float top = reinterpret_cast<const float*>(shared + l.row_top)[4 * s + t];
            unit[s] = fmaxf(1e-30f, top * p.scale * kLog2e * (k.is_raw() ? 1 : p.table[k.format].step / kQueryTop));
        }
        const int full_begin = this->visible_begin(min(first_row + kRows, p.n_rows) - 1), full_end = this->visible_end(first_row);
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
            most[s] = kLeast, sum[s] = 0;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) o[s][i] = 0;
        }

#pragma unroll 1
        for (int tile = first; tile < tile_end;) {
            const int next_tile = visible_from(tile + stride);
            const unsigned steps = static_cast<unsigned>(next_tile - tile);
            const uint8_t* k_next = k_tile + static_cast<std::size_t>(k_stride) * steps;
            const uint8_t* v_next = v_tile + static_cast<std::size_t>(v_stride) * steps;
            stride = 2 * kWarps - stride;
            const unsigned seen = tile_mask.take();
            tile_mask.look_ahead(*this, next_tile);
            if (!(seen & kMaskShows)) {
                if (has_term) terms.pass(tile_pos, next_tile, tile_end, lane);
                if (next_tile < tile_end) keys.load(k, k_next, lane);
                tile = next_tile, k_tile = k_next, v_tile = v_next;
                continue;
            }
            if (has_term) ready_terms(terms, l, tile_pos, tile, next_tile);
            values.load(v, v_tile, lane);
            float x[kGroups][8];
            for_format<kFormat>(k.format, [&]<CodecId F>() {
                scores<F, D, kGroups, kAhead>(table_of(fragment_codec_index(F)), lut, k_tile, keys.chunk, q, lane, x);
            });
            float factor[8];
            if (k.is_raw()) {
#pragma unroll
                for (int j = 0; j < 8; ++j) factor[j] = 1;
            } else {
                keys.scale(factor);
            }
            if (next_tile < tile_end) keys.load(k, k_next, lane);

            const bool edge = tile * kTileKeys < full_begin || (tile + 1) * kTileKeys > full_end;
            float beta[kGroups];
#pragma unroll
            for (int s = 0; s < kGroups; ++s) {
                const float by = general ? 1 : unit[s];
#pragma unroll
                for (int j = 0; j < 8; ++j) x[s][j] *= factor[j];
                if (general) {
                    float e[8] = {};
                    if (has_term) get_terms(Terms::at(shared, l, p.term.n_pad, warp, s), terms.slot, lane, e);
#pragma unroll
                    for (int j = 0; j < 8; ++j) x[s][j] = fmaf(x[s][j], unit[s], e[j]);
                }
                if ((mask && seen & kMaskCounts) || p.softcap != 0) bend(seen & kMaskCounts ? mask : nullptr, tile, s, x[s]);
                if (edge) {
                    const int row = min(first_row + 4 * s + t, p.n_rows - 1), begin = this->visible_begin(row), end = this->visible_end(row);
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        const int cell = tile * kTileKeys + cell_at(j, g);
                        if (cell < begin || cell >= end) x[s][j] = -INFINITY;
                    }
                }
                float top = x[s][0];
#pragma unroll
                for (int j = 1; j < 8; ++j) top = fmaxf(top, x[s][j]);
#pragma unroll
                for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                const float tile_most = fmaxf(top * by, kLeast), now = fmaxf(most[s], tile_most);
                beta[s] = exp2_fast(tile_most - now);
                if (__any_sync(~0u, now > most[s])) {
                    const float alpha = exp2_fast(most[s] - now);
                    sum[s] *= alpha;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) o[s][j] *= alpha;
                    most[s] = now;
                }
                float total = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) x[s][j] = exp2_fast(fmaf(x[s][j], by, -tile_most)), total += x[s][j];
                sum[s] = fmaf(total, beta[s], sum[s]);
            }

            __syncwarp();  // what follows wants whole warps; branches by lane lie behind
            uint32_t b[kGroups][4];
            if (!v.is_raw()) {
                // 16-bit weights, relative to the tile's largest weight and scale: nothing is lost in long contexts.
                // Of cells that some row sees: what a hidden cell held before must not choose how is rounded.
                values.scale(factor);
                float top = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    float weight = x[0][j];
#pragma unroll
                    for (int s = 1; s < kGroups; ++s) weight = fmaxf(weight, x[s][j]);
                    top = fmaxf(top, weight > 0 ? factor[j] : 0);
                }
#pragma unroll
                for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                const float inverse = top > 0 ? __fdividef(65535.f, top) : 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) factor[j] *= inverse;
#pragma unroll
                for (int s = 0; s < kGroups; ++s) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) x[s][j] = fmaf(x[s][j], factor[j], 8388608.f);
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        b[s][j] = movmatrix(prmt(__float_as_uint(x[s][2 * j]), __float_as_uint(x[s][2 * j + 1]), 0x4051));
                    beta[s] *= top * (1.f / 65535.f);
                }
            }
            for_format<kFormat>(v.format, [&]<CodecId F>() {
                weigh<F, D, kGroups, kAhead>(table_of(fragment_codec_index(F)), lut + 256, v_tile, values.chunk, x, b, beta, lane, o);
            });
            tile = next_tile, k_tile = k_next, v_tile = v_next;
        }
        return v.is_raw() ? 1.f : p.table[v.format].step;
    }

  private:
    /// The warp's first tile from this one on of which a row of the block sees a cell. Exact rows are those of all sequences and of the whole
    /// batch, and a query sees few of them; of others every tile counts.
    __device__ __forceinline__ int visible_from(int tile) const {
        if (!kMayBeExact || !exact || !p.exact_mask) return tile;
        const int last = (min(first_row + kRows, p.n_rows) - 1) / p.group;
        for (; tile < tile_end; tile += kWarps) {
            bool hidden = true;
            for (int token = first_row / p.group; token <= last; ++token) {
                const uint16_t* m = p.exact_mask + item.seq * p.exact_mask_seq_stride + token * p.exact_mask_token_stride;
#pragma unroll
                for (int i = 0; i < kTileKeys; i += 32) {
                    const int cell = tile * kTileKeys + lane + i;
                    hidden &= cell >= n_kv || m[cell] == kMaskHidden;
                }
            }
            if (!__all_sync(~0u, hidden)) break;
        }
        return tile;
    }
    __device__ __forceinline__ void prefetch_tile(const uint8_t* tile, int code_bytes) const {
#pragma unroll 1
        for (int at = 128 * lane; at <= code_bytes; at += 128 * 32) prefetch_l2(tile + at);
    }

    /// What the mask says of a tile to the rows of the block, asked for a tile ahead.
    struct TileMask {
        int at = -1;  // in p.mask_tiles, of this lane's token
        unsigned seen = kMaskCounts | kMaskShows;

        __device__ __forceinline__ explicit TileMask(const Attend& a) {
            if ((kMayBeExact && a.exact) || !a.p.mask_tiles) return;
            const int token = a.first_row / a.p.group + a.lane, last = (min(a.first_row + kRows, a.p.n_rows) - 1) / a.p.group;
            seen = 0;
            if (token <= last) at = (a.item.seq * a.p.n_tokens + token) * ((a.p.n_kv + kTileKeys - 1) / kTileKeys);
        }
        __device__ __forceinline__ void look_ahead(const Attend& a, int tile) {
            if (at >= 0 && tile < a.tile_end) seen = __ldg(a.p.mask_tiles + at + tile);
        }
        __device__ __forceinline__ unsigned take() const { return __reduce_or_sync(~0u, seen); }
    };

    /// The terms that wait in shared memory.
    struct Terms {
        TermLane at_lane;
        int residue = -1;     // Queries::make_term
        int slot = 0;         // the present tile is the first or second of those whose terms are there
        bool second = false;  // there are terms of the tile after this one
        int pos = -1;         // even lanes: of a tile to come; odd ones: of the tile after that

        __device__ __forceinline__ void look_ahead(const int32_t* tile_pos, int tile, int tile_end, int lane) {
            if (tile < tile_end) pos = tile_pos[min(tile + (lane & 1), tile_end - 1)];
        }
        /// A tile that nobody sees.
        __device__ __forceinline__ void pass(const int32_t* tile_pos, int next_tile, int tile_end, int lane) {
            second = false;
            look_ahead(tile_pos, next_tile, tile_end, lane);
        }
        __device__ __forceinline__ static uint4* at(uint8_t* memory, const SharedLayout& l, int n_pad, int warp, int group) {
            return reinterpret_cast<uint4*>(memory + l.staged + (warp * kGroups + group) * staged_bytes(n_pad));
        }
    };

    /// Terms of a tile, and of the one after it where the warp takes pairs and their positions succeed each other.
    __device__ __forceinline__ void ready_terms(Terms& terms, const SharedLayout& l, const int32_t* tile_pos, int tile, int next_tile) const {
        if (terms.second) {
            terms.slot = 1, terms.second = false;
            terms.look_ahead(tile_pos, next_tile, tile_end, lane);
            return;
        }
        const int p0 = __shfl_sync(~0u, terms.pos, 0);
        const bool successive = __all_sync(~0u, p0 >= 0 && (p0 & 63) == terms.residue);
        // The last tile has itself for the one after it: positions say no then.
        terms.slot = 0, terms.second = next_tile == tile + 1 && successive && __all_sync(~0u, terms.pos == p0 + (lane & 1) * kTileKeys);
        const int id = p0 >> kTileTermBit, block = (p0 & ((1 << kTileTermBit) - 1)) >> 6;
        if (!terms.second) terms.look_ahead(tile_pos, next_tile, tile_end, lane);
#pragma unroll 1
        for (int s = 0; s < kGroups; ++s) {
            if (successive) {
                const auto make = [&]<int kSteps>() {
                    successive_terms<kSteps>(p.term, terms.at_lane, reinterpret_cast<const uint4*>(shared + l.panel),
                                             reinterpret_cast<const float2*>(shared + l.ab) + (id * kRows + 4 * s) * term_row_stride(kSteps > 0 ? 16 * kSteps : p.term.n_pad), block, lane,
                                             Terms::at(shared, l, kSteps > 0 ? 16 * kSteps : p.term.n_pad, warp, s));
                };
                constexpr int kAllTurned = (D / 2 + 15) / 16;  // the usual case: all dims are rotated by position
                if (kAllTurned <= 4 && p.term.n_pad == 16 * kAllTurned)
                    make.template operator()<kAllTurned>();
                else
                    make.template operator()<0>();
            } else {
                float e[8];
                scattered_term<D>(p, item.seq, kv_head, tile, n_kv, first_row + 4 * s, lane, e);
                put_terms(Terms::at(shared, l, p.term.n_pad, warp, s), 0, lane, e);
            }
        }
    }

    /// Soft-cap and mask of the logits (in units of log2) of row t of a group.
    __device__ __forceinline__ void bend(const uint16_t* mask, int tile, int group, float (&x)[8]) const {
        const int row = min(first_row + 4 * group + t, p.n_rows - 1);
        const float softcap = p.softcap * kLog2e, inverse_cap = 1 / softcap, slope = mask ? this->slope_of(row) : 0;
        const uint16_t* m = nullptr;
        if (mask && exact)
            m = mask + item.seq * p.exact_mask_seq_stride + row / p.group * p.exact_mask_token_stride;
        else if (mask)
            m = mask + item.seq * p.mask_seq_stride + row / p.group * p.mask_token_stride +
                (kv_head * p.group + row % p.group) % p.mask_heads * p.mask_head_stride;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float y = x[j];
            if (p.softcap != 0) y = softcap * tanhf(y * inverse_cap);
            const int cell = tile * kTileKeys + cell_at(j, g);
            if (m && cell < n_kv) y = fmaf(__half2float(__ushort_as_half(m[cell])), slope, y);
            x[j] = y;
        }
    }
};

template <int D, int kGroups, int kFormat, bool kTerm>
__global__ void __launch_bounds__(32 * kWarps, kernel_blocks(D, kGroups, kFormat)) attend_kernel(const __grid_constant__ AttentionParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    Block<D, kGroups> block(p, shared);
    block.find_work();
    float o[kGroups][D / 8], most[kGroups], sum[kGroups], step;
    if (kFormat != kAnyFormat && block.exact)
        step = Attend<D, kGroups, fragment_codec_index(CodecId::raw), false>(block).run(o, most, sum);
    else
        step = Attend<D, kGroups, kFormat, kTerm>(block).run(o, most, sum);
    let_next_begin();
    Merge<D, kGroups>(block).finish(step, o, most, sum);
}

}  // namespace turboquant::cuda
