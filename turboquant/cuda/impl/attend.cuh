// Attention of a few query rows over compressed tiles: one block reads a range of one KV head's tiles, each warp every fourth of them, with
// plain 16-byte loads into registers (the next tile's keys while values are weighed, values while keys are scored). Blocks of one head
// leave partial results; the last of them to finish merges. Source of the split: FlashDecoding; of the merge: arXiv:2501.01005, eq. 3.
#pragma once

#include "turboquant/cuda/impl/products.cuh"
#include "turboquant/cuda/impl/rotate.cuh"
#include "turboquant/cuda/impl/shared_layout.h"
#include "turboquant/cuda/impl/term.cuh"

namespace turboquant::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kQueryTop = 32500;  // 15 bits in two signed bytes
inline constexpr float kLeast = -1e30f;    // below all logits; differences of it with itself are 0, not NaN

/// Calls f.template operator()<codec>() for the format of an index into kFragmentCodecs. Uniform in the block.
template <class F>
__device__ __forceinline__ void for_format(int index, F&& f) {
    switch (index) {
        case 0:
            return f.template operator()<CodecId::turbo2>();
        case 1:
            return f.template operator()<CodecId::turbo3>();
        case 2:
            return f.template operator()<CodecId::turbo4>();
        case 3:
            return f.template operator()<CodecId::turbo5>();
        case 4:
            return f.template operator()<CodecId::turbo6>();
        case 5:
            return f.template operator()<CodecId::turbo8>();
        case 6:
            return f.template operator()<CodecId::tcq1>();
        case 7:
            return f.template operator()<CodecId::tcq2>();
        case 8:
            return f.template operator()<CodecId::tcq3>();
        case 9:
            return f.template operator()<CodecId::tcq4>();
        case 10:
            return f.template operator()<CodecId::tcq5>();
        default:
            return f.template operator()<CodecId::raw>();
    }
}

__device__ __forceinline__ bool format_is_raw(int index) { return index == fragment_codec_index(CodecId::raw); }
__device__ __forceinline__ bool format_is_trellis(int index) {
    return index >= fragment_codec_index(CodecId::tcq1) && index <= fragment_codec_index(CodecId::tcq5);
}
__device__ __forceinline__ int format_bits(int index) {  // 4 bits each, raw's 16 as 0
    return static_cast<int>(0x054321865432ull >> 4 * index & 15);
}
__device__ __forceinline__ bool format_uses_lut(int index) { return (index >= 3 && index <= 5) || index == 10; }

/// Tells the compiler that a value is the same in all lanes: it then lives in a uniform register.
__device__ __forceinline__ int uniform(int x) { return __reduce_max_sync(~0u, x); }

/// One side of the item that a block works on.
struct Stream {
    const uint8_t* tiles;
    std::size_t stride;
    int format, n_chunks, code_bytes, scales_at;  // raw has no scales: anything is read
    __device__ __forceinline__ Stream(const SideParams& s, int seq, int head, int head_dim) {
        format = s.codec;
        tiles = s.tiles + seq * s.seq_stride;
        if (s.head_codec) {
            format = uniform(s.head_codec[head]);
            const std::size_t at = s.head_at[head];
            tiles += static_cast<std::size_t>(static_cast<unsigned>(uniform(static_cast<int>(at >> 31)))) << 31 | static_cast<unsigned>(uniform(static_cast<int>(at & 0x7fffffff)));
        } else {
            tiles += head * s.head_stride;
        }
        stride = s.tile_stride;
        const int bits = format_is_raw(format) ? 16 : format_bits(format);
        n_chunks = head_dim / 16 * bits / 4, code_bytes = 8 * head_dim * bits, scales_at = format_is_raw(format) ? 0 : code_bytes;
    }
};

/// First chunks of a lane and the scales of its keys.
template <int kAhead>
struct Ahead {
    uint4 chunk[kAhead], scales;

    __device__ __forceinline__ void load(const Stream& s, int tile, int lane) {
        const uint8_t* p = s.tiles + tile * s.stride;
#pragma unroll
        for (int c = 0; c < kAhead; ++c)
            if (c < s.n_chunks) chunk[c] = load_streaming(p + c * 512 + lane * 16);
        scales = load_streaming(p + s.scales_at + (lane >> 2) * 16);
    }
    __device__ __forceinline__ void scale(float (&x)[8]) const {
        const uint32_t w[4] = {scales.x, scales.y, scales.z, scales.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
            x[2 * i] = f.x, x[2 * i + 1] = f.y;
        }
    }
};

template <int D, int kGroups>
struct Attend {
    static constexpr int kRows = 4 * kGroups, n = fragment_rows(D), kAhead = kernel_ahead(D);
    using Layout = SharedLayout;

    const AttentionParams& p;
    uint8_t* const shared;
    const int thread, warp, lane, g, t;

    // The work of this block.
    AttentionItem item;
    int item_index, kv_head, row_block, first_row, n_kv;
    bool exact;
    int tile_begin, tile_end;

    __device__ __forceinline__ Attend(const AttentionParams& params, uint8_t* memory)
        : p(params), shared(memory), thread(threadIdx.x), warp(uniform(threadIdx.x >> 5)), lane(threadIdx.x & 31), g(lane >> 2), t(lane & 3) {}

    __device__ __forceinline__ int position_of(int row) const { return n_kv - p.n_tokens + row / p.group; }
    __device__ __forceinline__ int visible_end(int row) const { return p.causal && !exact ? min(n_kv, position_of(row) + 1) : n_kv; }
    __device__ __forceinline__ int visible_begin(int row) const {
        return p.window > 0 && !exact ? max(0, position_of(row) + 1 - p.window) : 0;
    }

    /// The head's compressed rows are in the rotated space.
    __device__ __forceinline__ bool is_rotated(const SideParams& s) const {
        return !format_is_raw(s.head_codec ? uniform(s.head_codec[kv_head]) : s.codec);
    }

    __device__ __forceinline__ void find_work() {
        item_index = blockIdx.x;
        if (p.items) {
            const AttentionItem from = p.items[item_index];
            item = {uniform(from.seq), uniform(from.split), uniform(from.n_splits), uniform(from.first_item)};
        } else {
            item.seq = item_index / p.splits_each, item.split = item_index % p.splits_each, item.n_splits = p.splits_each;
            item.first_item = item_index - item.split;
        }
        kv_head = blockIdx.y, row_block = blockIdx.z, first_row = row_block * kRows;
        exact = p.has_exact && item.split == item.n_splits - 1;
        n_kv = p.n_kv;
        if (exact || p.seq_n_kv) n_kv = uniform(exact ? p.exact_n[item.seq] : p.seq_n_kv[item.seq]);
        const int last_row = min(first_row + kRows, p.n_rows) - 1;
        const int begin = visible_begin(first_row) / kTileKeys, end = (visible_end(last_row) + kTileKeys - 1) / kTileKeys;
        const int splits = item.n_splits - (p.has_exact ? 1 : 0), split = exact ? 0 : item.split, n_tiles = max(0, end - begin);
        // In 32 bits: up to 2^24 tiles in 128 parts.
        tile_begin = exact ? begin : begin + static_cast<int>(static_cast<unsigned>(n_tiles) * split / splits);
        tile_end = exact ? end : begin + static_cast<int>(static_cast<unsigned>(n_tiles) * (split + 1) / splits);
    }

    /// Rotated queries and their largest magnitudes, then the operands of the key format.
    __device__ __forceinline__ void make_queries(const Layout& l, int format) {
        float* rows = reinterpret_cast<float*>(shared + l.rows);
        float* top = reinterpret_cast<float*>(shared + l.row_top);
        const float* q = (exact && p.exact_q ? p.exact_q : p.q) + item.seq * p.q_seq_stride;
        const bool rotate_q = is_rotated(p.k);
#pragma unroll 1
        for (int r = warp; r < kRows; r += kWarps) {
            const int row = first_row + r, token = row / p.group;
            float* x = rows + r * D;
            const float* from = q + token * p.q_token_stride + (kv_head * p.group + row - token * p.group) * p.q_head_stride;
            float most = 0;
            if constexpr ((D & (D - 1)) == 0) {
                float v[D / 32];
#pragma unroll
                for (int i = 0; i < D / 32; ++i) v[i] = row < p.n_rows ? from[lane + 32 * i] : 0;
                if (rotate_q) rotate_lanes<D>(v, lane, p.signs_in, p.signs_out);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) x[lane + 32 * i] = v[i], most = fmaxf(most, fabsf(v[i]));
            } else {
                for (int i = lane; i < D; i += 32) x[i] = row < p.n_rows ? from[i] : 0;
                if (rotate_q) rotate_row<D>(x, lane, p.signs_in, p.signs_out, p.hartley);
                for (int i = lane; i < D; i += 32) most = fmaxf(most, fabsf(x[i]));
            }
#pragma unroll
            for (int d = 1; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
            if (lane == 0) top[r] = most;
        }
        __syncthreads();
        uint32_t* operands = reinterpret_cast<uint32_t*>(shared + l.operands);
        const bool raw = format_is_raw(format), trellis = format_is_trellis(format);
#pragma unroll 1
        for (int i = thread; i < kGroups * (raw ? 2 : 1) * n * 32; i += 32 * kWarps) {
            const int to = i & 31, reg = i / 32 % (raw ? 2 * n : n), group = i / 32 / (raw ? 2 * n : n), column = to >> 2, r = 4 * group + (column >> 1);
            const float* x = rows + r * D + (to & 3) * 4 * n;
            const float most = top[r], f = most > 0 ? (raw ? 1 : kQueryTop) / most : 0;
            uint32_t word = 0;
            if (raw) {
                const float a = x[2 * reg] * f, b = x[2 * reg + 1] * f;
                const __half2 hi = __floats2half2_rn(a, b);
                const float2 back = __half22float2(hi);
                word = bits_of(column & 1 ? __floats2half2_rn(a - back.x, b - back.y) : hi);
            } else {
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int v = __float2int_rn(x[trellis ? reg + n * b : 4 * reg + b] * f), lo = static_cast<int8_t>(v), hi = (v - lo) >> 8;
                    word |= static_cast<uint32_t>((column & 1 ? lo : hi) & 255) << 8 * b;
                }
            }
            operands[(group * 2 * n + reg) * 32 + to] = word;
        }
    }

    /// What successive_term needs; returns p0 % 64 of the tiles it is for, -1 if there is none.
    __device__ __forceinline__ int make_term(const Layout& l) {
        const TermParams& term = p.term;
        if (!term.n_freq || exact || tile_begin >= tile_end) return -1;
        uint4* panel = reinterpret_cast<uint4*>(shared + l.panel);
#pragma unroll 4
        for (int i = thread; i < term.n_pad / 16 * 256; i += 32 * kWarps)
            copy_async(panel + i, term.panel + i);
        const int p0 = uniform(term.tile_pos[item.seq * term.tile_seq_stride + tile_begin]);
        const int residue = p0 >= 0 ? p0 & 63 : 0;
        float2* ab = reinterpret_cast<float2*>(shared + l.ab);
        const float scale = p.scale * kLog2e;
#pragma unroll 1
        for (int r = warp; r < term.n_terms * kRows; r += kWarps) {
            const int row = first_row + r % kRows, token = row / p.group;
            const float* q = term.q_term + item.seq * term.seq_stride +
                             ((static_cast<std::size_t>(r / kRows) * p.n_tokens + token) * p.n_head + kv_head * p.group + row - token * p.group) * 2 * term.n_freq;
#pragma unroll 1
            for (int f = lane; f < term.n_pad; f += 32) {
                float2 x = make_float2(0, 0);
                if (f < term.n_freq && row < p.n_rows)
                    x = turned(turned(make_float2(q[f] * scale, q[term.n_freq + f] * scale), __ldg(term.turns + residue * term.n_pad + f)),
                               __ldg(term.turns + 64 * term.n_pad + f));
                ab[r * term.n_pad + f] = x;
            }
        }
        wait_for_copies();
        return residue;
    }

    __device__ __forceinline__ float slope_of(int row) const {
        if (p.max_bias == 0) return kLog2e;
        const int h = kv_head * p.group + row % p.group;
        int n2 = 1;
        while (2 * n2 <= p.n_head) n2 *= 2;
        const float exponent = h < n2 ? -p.max_bias * (h + 1) / n2 : -p.max_bias / 2 * (2 * (h - n2) + 1) / n2;
        return kLog2e * exp2f(exponent);
    }

    __device__ __forceinline__ void run() {
        find_work();
        const Layout l = shared_layout(D, kGroups, p.term.n_pad, p.term.n_terms, 0);
        const Stream k(exact ? p.exact_k : p.k, item.seq, kv_head, D), v(exact ? p.exact_v : p.v, item.seq, kv_head, D);
        const int first = tile_begin + warp, n_tiles = max(0, (tile_end - first + kWarps - 1) / kWarps);
        Ahead<kAhead> keys, values;
        if (n_tiles > 0) keys.load(k, first, lane), prefetch_l2(v.tiles + first * v.stride + 128 * min(lane, v.code_bytes / 128));
        uint32_t* lut = reinterpret_cast<uint32_t*>(shared + l.lut);
        if (format_uses_lut(k.format))
#pragma unroll 1
            for (int i = thread; i < 256; i += 32 * kWarps) lut[i] = p.lut[k.format * 256 + i];
        if (format_uses_lut(v.format))
#pragma unroll 1
            for (int i = thread; i < 256; i += 32 * kWarps) lut[256 + i] = p.lut[v.format * 256 + i];
        const int residue = make_term(l);
        make_queries(l, k.format);
        __syncthreads();
        QueryOperand<D, kGroups> q;
        q.shared = reinterpret_cast<const uint32_t*>(shared + l.operands) + lane;
        if (!format_is_raw(k.format)) q.load();

        // Factors of the lane's rows, t of each group: integer score * scale of the key * unit = logit in units of log2.
        float unit[kGroups];
        const float softcap = p.softcap * kLog2e, inverse_cap = p.softcap != 0 ? 1 / softcap : 0;
        const uint16_t* mask = exact ? p.exact_mask : p.mask;
        const bool raw_keys = format_is_raw(k.format), has_term = residue >= 0;
        const bool general = has_term || mask || p.softcap != 0;
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
            const float top = reinterpret_cast<const float*>(shared + l.row_top)[4 * s + t];
            unit[s] = fmaxf(1e-30f, top * p.scale * kLog2e * (raw_keys ? 1 : p.table[k.format].step / kQueryTop));
        }
        const int full_begin = visible_begin(min(first_row + kRows, p.n_rows) - 1), full_end = visible_end(first_row);

        float o[kGroups][D / 8], most[kGroups], sum[kGroups];
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
            most[s] = kLeast, sum[s] = 0;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) o[s][i] = 0;
        }

        for (int i = 0; i < n_tiles; ++i) {
            const int tile = first + i * kWarps;
            const uint8_t *k_tile = k.tiles + tile * k.stride, *v_tile = v.tiles + tile * v.stride;
            values.load(v, tile, lane);
            float x[kGroups][8];
            for_format(k.format, [&]<CodecId F>() {
                scores<F, D, kGroups, kAhead>(p.table[fragment_codec_index(F)].prmt, lut, k_tile, keys.chunk, q, lane, x);
            });
            float factor[8];
            if (raw_keys) {
#pragma unroll
                for (int j = 0; j < 8; ++j) factor[j] = 1;
            } else {
                keys.scale(factor);
            }
            if (i + 1 < n_tiles) keys.load(k, tile + kWarps, lane);

            const bool edge = tile * kTileKeys < full_begin || (tile + 1) * kTileKeys > full_end;
            int p0 = -1, term_id = 0;
            if (has_term) {
                p0 = uniform(p.term.tile_pos[item.seq * p.term.tile_seq_stride + tile]);
                // Not by uniform(): so compiled by nvcc 13.0, the first of two groups used a wrong term (CudaAttention.TermsOfTilesInBothGroups).
                if (p.term.cell_term) term_id = p.term.cell_term[item.seq * p.term.cell_seq_stride + tile * kTileKeys];
            }
            float tile_most[kGroups], beta[kGroups], by[kGroups];
#pragma unroll
            for (int s = 0; s < kGroups; ++s) {
                by[s] = general ? 1 : unit[s];
                const int row = min(first_row + 4 * s + t, p.n_rows - 1);
#pragma unroll
                for (int j = 0; j < 8; ++j) x[s][j] *= factor[j];
                if (general) {
                    float e[8] = {};
                    if (has_term) {
                        if (p0 >= 0 && (p0 & 63) == residue) {
                            successive_term(p.term, reinterpret_cast<const uint4*>(shared + l.panel),
                                            reinterpret_cast<const float2*>(shared + l.ab) + (term_id * kRows + 4 * s) * p.term.n_pad, p0 >> 6, lane, e);
                        } else {
                            scattered_term(p, item.seq, kv_head, tile, n_kv, first_row + 4 * s, lane, e);
                        }
                    }
#pragma unroll
                    for (int j = 0; j < 8; ++j) x[s][j] = fmaf(x[s][j], unit[s], e[j]);
                }
                if (mask || p.softcap != 0) {
                    const float slope = mask ? slope_of(row) : 0;
                    const uint16_t* m = nullptr;
                    if (mask && exact)
                        m = mask + item.seq * p.exact_mask_seq_stride + row / p.group * p.exact_mask_token_stride;
                    else if (mask)
                        m = mask + item.seq * p.mask_seq_stride + row / p.group * p.mask_token_stride +
                            (kv_head * p.group + row % p.group) % p.mask_heads * p.mask_head_stride;
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        float y = x[s][j];
                        if (p.softcap != 0) y = softcap * tanhf(y * inverse_cap);
                        const int cell = tile * kTileKeys + cell_at(j, g);
                        if (m && cell < n_kv) y = fmaf(__half2float(__ushort_as_half(m[cell])), slope, y);
                        x[s][j] = y;
                    }
                }
                if (edge) {
                    const int begin = visible_begin(row), end = visible_end(row);
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
                tile_most[s] = fmaxf(top * by[s], kLeast);
                const float now = fmaxf(most[s], tile_most[s]);
                beta[s] = exp2_fast(tile_most[s] - now);
                if (__any_sync(~0u, now > most[s])) {
                    const float alpha = exp2_fast(most[s] - now);
                    sum[s] *= alpha;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) o[s][j] *= alpha;
                    most[s] = now;
                }
                float total = 0;
#pragma unroll
                for (int j = 0; j < 8; ++j) x[s][j] = exp2_fast(fmaf(x[s][j], by[s], -tile_most[s])), total += x[s][j];
                sum[s] = fmaf(total, beta[s], sum[s]);
            }

            __syncwarp();  // what follows wants whole warps; branches by lane lie behind
            uint32_t b[kGroups][4];
            if (!format_is_raw(v.format)) {
                // 16-bit weights, relative to the tile's largest weight and scale: nothing is lost in long contexts.
                values.scale(factor);
                float top = factor[0];
#pragma unroll
                for (int j = 1; j < 8; ++j) top = fmaxf(top, factor[j]);
#pragma unroll
                for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
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
            for_format(v.format, [&]<CodecId F>() {
                weigh<F, D, kGroups, kAhead>(p.table[fragment_codec_index(F)].prmt, lut + 256, v_tile, values.chunk, x, b, beta, lane, o);
            });
        }
        finish(format_is_raw(v.format) ? 1.f : p.table[v.format].step, o, most, sum);
    }

    /// Merges the warps, then the blocks.
    __device__ __forceinline__ void finish(float step, float (&o)[kGroups][D / 8], float (&most)[kGroups], float (&sum)[kGroups]) {
        const Layout l = shared_layout(D, kGroups, 0, 0, item.n_splits);
        float* of_warps = reinterpret_cast<float*>(shared + l.of_warps);
        float2* state = reinterpret_cast<float2*>(shared + l.state);
        float* rows = reinterpret_cast<float*>(shared + l.result);
        constexpr int kStride = D + 4;
        __syncthreads();
#pragma unroll
        for (int s = 0; s < kGroups; ++s) {
#pragma unroll
            for (int d = 4; d < 32; d *= 2) sum[s] += __shfl_xor_sync(~0u, sum[s], d);
            float* to = of_warps + (warp * kRows + 4 * s + t) * kStride + g * (D / 8);
#pragma unroll
            for (int i = 0; i < D / 8; ++i) to[i] = o[s][i] * step;
            if (g == 0) state[warp * kRows + 4 * s + t] = make_float2(most[s], sum[s]);
        }
        __syncthreads();
        const int n_units = p.n_head_kv * p.n_row_blocks, unit = kv_head * p.n_row_blocks + row_block;
        const std::size_t slot = static_cast<std::size_t>(item_index) * n_units + unit;
        const bool alone = item.n_splits == 1;
        float2* total = reinterpret_cast<float2*>(shared + l.total);
#pragma unroll 1
        for (int i = thread; i < kRows * D / 4; i += 32 * kWarps) {
            const int r = i / (D / 4), d = i % (D / 4) * 4;
            float top = kLeast, all = 0;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) top = fmaxf(top, state[w * kRows + r].x);
            float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
                const float2 ml = state[w * kRows + r];
                const float f = exp2_fast(ml.x - top);
                const float4 y = *reinterpret_cast<const float4*>(of_warps + (w * kRows + r) * kStride + d);
                all = fmaf(f, ml.y, all);
                x.x = fmaf(f, y.x, x.x), x.y = fmaf(f, y.y, x.y), x.z = fmaf(f, y.z, x.z), x.w = fmaf(f, y.w, x.w);
            }
            if (alone)
                *reinterpret_cast<float4*>(rows + r * D + d) = x;
            else
                reinterpret_cast<float4*>(p.part + slot * kRows * D)[i] = x;
            if (d == 0) (alone ? total : p.part_ml + slot * kRows)[r] = make_float2(top, all);
        }
        if (!alone && !merge_blocks(l, n_units, unit, rows, total)) return;
        __syncthreads();
        write(rows, total);
    }

    /// True in the last block of its head to get here; then `rows` and `total` hold the merged result.
    __device__ __forceinline__ bool merge_blocks(const Layout& l, int n_units, int unit, float* rows, float2* total) {
        int* last = reinterpret_cast<int*>(shared + l.last);
        __threadfence();
        __syncthreads();
        unsigned* count = p.count + static_cast<std::size_t>(item.seq) * n_units + unit;
        if (thread == 0) *last = atomicAdd(count, 1u) == item.n_splits - 1u;
        __syncthreads();
        if (!*last) return false;
        __threadfence();
        if (thread == 0) *count = 0;
        constexpr int kBatch = 16;
        const std::size_t first = (static_cast<std::size_t>(item.first_item) * n_units + unit) * kRows, step = static_cast<std::size_t>(n_units) * kRows;
        const float4* parts = reinterpret_cast<const float4*>(p.part + first * D);
        const int i0 = thread;
        float4 x[kBatch];
#pragma unroll
        for (int s = 0; s < kBatch; ++s)
            x[s] = s < item.n_splits && i0 < kRows * D / 4 ? __ldcg(parts + s * step * (D / 4) + i0) : make_float4(0, 0, 0, 0);
        // Weights of the splits, while the first parts are on their way.
        float* weights = reinterpret_cast<float*>(shared + l.weights);
#pragma unroll 1
        for (int r = warp; r < kRows; r += kWarps) {
            float top = kLeast, all = 0;
#pragma unroll 1
            for (int s = lane; s < item.n_splits; s += 32) {
                const float2 ml = __ldcg(p.part_ml + first + s * step + r);
                const float now = fmaxf(top, ml.x);
                all = fmaf(all, exp2_fast(top - now), ml.y * exp2_fast(ml.x - now));
                top = now;
                weights[r * item.n_splits + s] = ml.x;
            }
            float m = top;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
            all *= exp2_fast(top - m);
#pragma unroll
            for (int d = 1; d < 32; d *= 2) all += __shfl_xor_sync(~0u, all, d);
#pragma unroll 1
            for (int s = lane; s < item.n_splits; s += 32) weights[r * item.n_splits + s] = exp2_fast(weights[r * item.n_splits + s] - m);
            if (lane == 0) total[r] = make_float2(m, all);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = i0; i < kRows * D / 4; i += 32 * kWarps) {
            const float* weight = weights + i / (D / 4) * item.n_splits;
            float4 y = make_float4(0, 0, 0, 0);
#pragma unroll 1
            for (int s0 = 0; s0 < item.n_splits; s0 += kBatch) {
                if (s0 > 0 || i != i0) {
#pragma unroll
                    for (int s = 0; s < kBatch; ++s)
                        x[s] = s0 + s < item.n_splits ? __ldcg(parts + (s0 + s) * step * (D / 4) + i) : make_float4(0, 0, 0, 0);
                }
#pragma unroll
                for (int s = 0; s < kBatch; ++s) {
                    const float f = s0 + s < item.n_splits ? weight[s0 + s] : 0;
                    y.x = fmaf(f, x[s].x, y.x), y.y = fmaf(f, x[s].y, y.y), y.z = fmaf(f, x[s].z, y.z), y.w = fmaf(f, x[s].w, y.w);
                }
            }
            reinterpret_cast<float4*>(rows)[i] = y;
        }
        return true;
    }

    /// Sinks, the division, the way back out of the rotated space.
    __device__ __forceinline__ void write(float* rows, const float2* total) {
        const bool rotate_out = is_rotated(p.v);
#pragma unroll 1
        for (int r = warp; r < kRows; r += kWarps) {
            const int row = first_row + r;
            if (row >= p.n_rows) break;
            const int token = row / p.group, head = kv_head * p.group + row - token * p.group;
            float* x = rows + r * D;
            float top = total[r].x, all = total[r].y;
            float f = 1;
            if (p.sinks) {
                const float sink = p.sinks[head] * kLog2e, now = fmaxf(top, sink);
                f = exp2_fast(top - now), all = fmaf(all, f, exp2_fast(sink - now)), top = now;
            }
            f = all > 0 ? f / all : 0;
            float* to = p.out + item.seq * p.out_seq_stride + token * p.out_token_stride + head * p.out_head_stride;
            if constexpr ((D & (D - 1)) == 0) {
                float v[D / 32];
#pragma unroll
                for (int i = 0; i < D / 32; ++i) v[i] = x[lane + 32 * i] * f;
                if (rotate_out) rotate_lanes<D>(v, lane, p.signs_out, p.signs_in);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) to[lane + 32 * i] = v[i];
            } else {
                for (int i = lane; i < D; i += 32) x[i] *= f;
                __syncwarp();
                if (rotate_out) rotate_row<D>(x, lane, p.signs_out, p.signs_in, p.hartley);
                for (int i = lane; i < D; i += 32) to[i] = x[i];
            }
            if (p.lse && lane == 0)
                p.lse[(static_cast<std::size_t>(item.seq) * p.n_tokens + token) * p.n_head + head] =
                    all > 0 ? (top + log2f(all)) * 0.6931471805599453f : -INFINITY;
        }
    }
};

template <int D, int kGroups>
__global__ void __launch_bounds__(32 * kWarps, kernel_blocks(D, kGroups)) attend_kernel(const __grid_constant__ AttentionParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    Attend<D, kGroups>(p, shared).run();
}

}  // namespace turboquant::cuda
