// Operands of prefill attention: codes become panels of bytes, queries become two planes of bytes. Once per call, for all query rows.
#pragma once

#include "turboquant/cuda/impl/formats.cuh"
#include "turboquant/cuda/impl/prefill_params.h"
#include "turboquant/cuda/impl/rotate.cuh"
#include "turboquant/cuda/impl/term.cuh"

namespace turboquant::cuda {

inline constexpr int kWideWarps = 8;
constexpr int panel_warps(bool wide) { return wide ? kWideWarps : 4; }

/// Formats whose levels are single bytes: those that panels can hold.
constexpr bool has_byte_levels(CodecId f) { return operands_of(f) != Operands::wide && operands_of(f) != Operands::halves; }

/// Calls f.template operator()<codec>() for the format of an index into kFragmentCodecs, if its levels are bytes.
template <class F>
__device__ __forceinline__ void for_byte_format(int index, F&& f) {
    switch (index) {
        case fragment_codec_index(CodecId::turbo2):
            return f.template operator()<CodecId::turbo2>();
        case fragment_codec_index(CodecId::turbo3):
            return f.template operator()<CodecId::turbo3>();
        case fragment_codec_index(CodecId::turbo4):
            return f.template operator()<CodecId::turbo4>();
        case fragment_codec_index(CodecId::tcq1):
            return f.template operator()<CodecId::tcq1>();
        case fragment_codec_index(CodecId::tcq2):
            return f.template operator()<CodecId::tcq2>();
        case fragment_codec_index(CodecId::tcq3):
            return f.template operator()<CodecId::tcq3>();
        case fragment_codec_index(CodecId::tcq4):
            return f.template operator()<CodecId::tcq4>();
        case fragment_codec_index(CodecId::tcq5):
            return f.template operator()<CodecId::tcq5>();
    }
}

/// Four levels from the bytes of a look-up.
template <CodecId F>
__device__ __forceinline__ uint32_t levels(uint32_t first, uint32_t second) {
    if constexpr (operands_of(F) == Operands::sum) return __vadd4(first, second);
    if constexpr (operands_of(F) == Operands::signs) return __vsub4(first, second);
    return first;
}

__device__ __forceinline__ void put_word(uint8_t* plane, int row, int word, uint32_t value) {
    *reinterpret_cast<uint32_t*>(plane + swizzled(row, word)) = value;
}

/// Keys of a tile into rows first_row.. of a plane. Word n*t + r of a row: dims 4n*t + 4r + b (trellis: 4n*t + r + n*b), b = 0..3.
template <CodecId F, int D>
__device__ __forceinline__ void decode_keys(const uint32_t* table, const uint32_t* lut, const uint8_t* tile, int lane, uint8_t* plane, int first_row) {
    constexpr int n = fragment_rows(D);
    const int g = lane >> 2, t = lane & 3, at = first_row + g;
    const uint4 ahead[1] = {load_streaming(tile + lane * 16)};
    LaneWords<F, Side::key, D, 1> w(tile, lane, ahead);
    if constexpr (is_trellis(F)) {
        uint32_t u[n + 7];
#pragma unroll
        for (int i = 0; i < n; ++i) u[7 + i] = w[i];
        fill_halo<Side::key, n>(u, lane);
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i % 2 == 0) w.load_next(tile, lane, i / 2);
            const Subsets z = subsets(u + 7 + i, F == CodecId::tcq4 ? w[n + (bits_of(F) - 1) * i] : 0);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t r[2], r2[2];
                octet<F, D>(table, lut, w, i, k, z, r, r2);
#pragma unroll
                for (int h = 0; h < 2; ++h) put_word(plane, at + 8 * (k + 4 * h), n * t + i, levels<F>(r[h], r2[h]));
            }
        }
    } else {
        constexpr int kSteps = n / 2;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            w.load_next(tile, lane, pair);
#pragma unroll
            for (int i = 0; i < n; ++i) {
                const int octet_at = pair * n + i;
                uint32_t r[2], r2[2];
                octet<F, D>(table, lut, w, octet_at / 4, octet_at % 4, Subsets{}, r, r2);
                const bool shared = i == 2 * kSteps;  // by the two keys: the last four dims of each
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int e = 2 * pair + (shared ? h : i / kSteps), word = shared ? n - 1 : 2 * (i % kSteps) + h;
                    put_word(plane, at + 8 * e, n * t + word, levels<F>(r[h], r2[h]));
                }
            }
        }
    }
}

/// Values of a tile, half 0 or 1 of a panel: row = dim, byte 64*half + 16k + 4t + b: the key at position 8(2k + (b&1)) + 2t + (b>>1).
template <CodecId F, int D>
__device__ __forceinline__ void decode_values(const uint32_t* table, const uint32_t* lut, const uint8_t* tile, int lane, uint8_t* plane, int half) {
    constexpr int n = fragment_rows(D);
    const int g = lane >> 2, t = lane & 3;
    const uint4 ahead[1] = {load_streaming(tile + lane * 16)};
    LaneWords<F, Side::value, D, 1> w(tile, lane, ahead);
    constexpr bool kTrellis = is_trellis(F);
    uint32_t u[kTrellis ? n + 7 : 8];
    if constexpr (kTrellis) {
#pragma unroll
        for (int i = 0; i < n; ++i) u[7 + i] = w[i];
        fill_halo<Side::value, n>(u, lane);
    }
#pragma unroll
    for (int row = 0; row < n; ++row) {
        w.load_next(tile, lane, row);
        Subsets z{};
        if constexpr (kTrellis) z = subsets(u + 7 + row, F == CodecId::tcq4 ? w[n + (bits_of(F) - 1) * row] : 0);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t r[2], r2[2];
            octet<F, D>(table, lut, w, row, k, z, r, r2);
#pragma unroll
            for (int h = 0; h < 2; ++h) put_word(plane, 2 * n * g + row + n * h, 16 * half + 4 * k + t, levels<F>(r[h], r2[h]));
        }
    }
}

/// Cell of a tile at a position.
__device__ __forceinline__ int cell_of_position(int p) { return p < kTileKeys / 2 ? p ^ 7 : p; }

/// A side's first tile of a sequence and head, and its format.
struct HeadTilesAt {
    const uint8_t* tiles;
    int format;
    __device__ __forceinline__ HeadTilesAt(const SideParams& s, int seq, int head)
        : tiles(s.tiles + seq * s.seq_stride + (s.head_at ? s.head_at[head] : head * s.head_stride)), format(s.head_codec ? s.head_codec[head] : s.codec) {}
};

__device__ __forceinline__ int cells_of(const AttentionParams& p, int seq) { return p.seq_n_kv ? min(p.seq_n_kv[seq], p.n_kv) : p.n_kv; }

/// Four integers of 15 bits as bytes, high and low ones.
struct WordPair {
    uint32_t high = 0, low = 0;
    __device__ __forceinline__ void put(int b, int v) {
        const int lo = static_cast<int8_t>(v), hi = (v - lo) >> 8;
        high |= static_cast<uint32_t>(hi & 255) << 8 * b, low |= static_cast<uint32_t>(lo & 255) << 8 * b;
    }
};
inline constexpr float kPrefillTop = 32500;
/// The dim that byte b of a row's word holds.
template <int D>
__device__ __forceinline__ int dim_of(int word, int b, bool trellis) {
    constexpr int n = fragment_rows(D);
    return word / n * 4 * n + (trellis ? word % n + n * b : 4 * (word % n) + b);
}
__device__ __forceinline__ bool is_trellis_index(int format) {
    return format >= fragment_codec_index(CodecId::tcq1) && format <= fragment_codec_index(CodecId::tcq5);
}

/// Keys of a panel, decoded, become wide: levels times scales plus the offset at the cells' positions, in units of the format's step.
/// Warps have the same number of rows; x: D floats of a warp's own.
template <int D>
__device__ __forceinline__ void widen_keys(const PrefillParams& p, int seq, int head, int panel, int n_kv, int warp, int lane, uint8_t* keys, float* scales, float* x) {
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
                const float2 unit = __ldg(term.turns + (pos & 63) * term.n_pad + f),
                             by = __ldg(term.turns + static_cast<std::size_t>(kTurnRows + (pos >> 6)) * term.n_pad + f);
                const float c = unit.x * by.x - unit.y * by.y, s = unit.y * by.x + unit.x * by.y;
                v[i] = fmaf(__ldg(offset + dim), c, __ldg(offset + D + dim) * s);
            }
            if constexpr ((D & (D - 1)) == 0) rotate_lanes<D>(v, lane, p.a.signs_in, p.a.signs_out);
#pragma unroll
            for (int i = 0; i < kEach; ++i)
                if (D % 32 == 0 || lane + 32 * i < D) x[lane + 32 * i] = v[i];
            __syncwarp();
            if constexpr ((D & (D - 1)) != 0) rotate_row<D>(x, lane, p.a.signs_in, p.a.signs_out, p.a.hartley);
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

/// One panel per block: of its first four warps two have a tile of keys each, two of values. Wide keys are the work of all.
/// grid: panels, kv heads, sequences.
template <int D, bool kWide>
__global__ void __launch_bounds__(32 * panel_warps(kWide)) make_panels(const __grid_constant__ PrefillParams p) {
    constexpr PanelLayout l = panel_layout(D, kWide);
    extern __shared__ __align__(16) uint8_t memory[];
    uint8_t* image = memory;
    uint32_t* lut = reinterpret_cast<uint32_t*>(memory + l.bytes);  // [keys, values][256]
    const int panel = blockIdx.x, head = blockIdx.y, seq = blockIdx.z, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int n_kv = cells_of(p.a, seq), half = warp & 1, first_cell = panel * kPanelKeys + half * kTileKeys;
    if (panel * kPanelKeys >= n_kv) return;
    if (p.a.window > 0 && (panel + 1) * kPanelKeys <= n_kv - p.a.n_tokens + 1 - p.a.window) return;  // no row sees it
    const bool is_value = warp >= 2, decodes = warp < 4;
    const SideParams& side = is_value ? p.a.v : p.a.k;
    const HeadTilesAt from(side, seq, head);
    const int format = __shfl_sync(~0u, from.format, 0);
    const uint8_t* tile = from.tiles + (first_cell / kTileKeys) * side.tile_stride;
    if (decodes && format == fragment_codec_index(CodecId::tcq5)) {
        for (int i = lane + 32 * half; i < 256; i += 64) lut[256 * is_value + i] = p.a.lut[format * 256 + i];
    }
    if constexpr (D < kPanelRow) {  // what pads the keys' rows
        if (!is_value)
            for (int i = lane; i < kTileKeys * (kPanelRow - D) / 4; i += 32)
                put_word(image + l.keys, kTileKeys * half + i / ((kPanelRow - D) / 4), D / 4 + i % ((kPanelRow - D) / 4), 0);
    }
    __syncthreads();
    float scale[2] = {};
    if (!decodes) {
    } else if (first_cell < n_kv) {
        for_byte_format(format, [&]<CodecId F>() {
            const uint32_t* table = p.a.table[fragment_codec_index(F)].prmt;
            if (is_value)
                decode_values<F, D>(table, lut + 256, tile, lane, image + l.values, half);
            else
                decode_keys<F, D>(table, lut, tile, lane, image + l.keys, kTileKeys * half);
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + 8 * D * bits_of(F));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int position = lane + 32 * i;
                if (first_cell + cell_of_position(position) < n_kv) scale[i] = __half2float(__ushort_as_half(scales[position % 8 * 8 + position / 8]));
            }
        });
    } else if (is_value) {
        for (int i = lane; i < D * 16; i += 32) put_word(image + l.values, i / 16, 16 * half + i % 16, 0);
    } else {
        for (int i = lane; i < kTileKeys * D / 4; i += 32) put_word(image + l.keys, kTileKeys * half + i / (D / 4), i % (D / 4), 0);
    }
    float* to = reinterpret_cast<float*>(image + (is_value ? l.value_scales + 16 : l.key_scales)) + kTileKeys * half;
    if (decodes) to[lane] = scale[0], to[lane + 32] = scale[1];
    __syncthreads();
    if (decodes && is_value) {
        const float* all = reinterpret_cast<const float*>(image + l.value_scales + 16);
        float top = fmaxf(fmaxf(all[lane], all[lane + 32]), fmaxf(all[lane + 64], all[lane + 96]));
#pragma unroll
        for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float inverse = top > 0 ? kWeightTop / top : 0;
        asm volatile("bar.sync 1, 64;" ::: "memory");  // both warps have read
        to[lane] = scale[0] * inverse, to[lane + 32] = scale[1] * inverse;
        if (warp == 2 && lane < 4) reinterpret_cast<float*>(image + l.value_scales)[lane] = top * (1.f / kWeightTop);
    }
    if constexpr (kWide) {
        __syncthreads();
        widen_keys<D>(p, seq, head, panel, n_kv, warp, lane, image + l.keys, reinterpret_cast<float*>(image + l.key_scales),
                      reinterpret_cast<float*>(lut + 512) + warp * D);
    }
    __syncthreads();
    uint4* out = reinterpret_cast<uint4*>(p.panels + ((static_cast<std::size_t>(seq) * p.a.n_head_kv + head) * p.n_panels + panel) * l.bytes);
    for (int i = threadIdx.x; i < l.bytes / 16; i += 32 * panel_warps(kWide)) out[i] = reinterpret_cast<const uint4*>(image)[i];
}

/// One query row per warp, eight per block. grid: rows (padded) / 8, kv heads, sequences.
template <int D>
__global__ void __launch_bounds__(256) make_queries(const __grid_constant__ PrefillParams p) {
    __shared__ float rows[8][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x * 8 + warp, head = blockIdx.y, seq = blockIdx.z;
    const int token = row / p.a.group, format = HeadTilesAt(p.a.k, seq, head).format;
    const bool trellis = is_trellis_index(format);
    float* x = rows[warp];
    const float* from = p.a.q + seq * p.a.q_seq_stride + token * p.a.q_token_stride + (head * p.a.group + row - token * p.a.group) * p.a.q_head_stride;
    float top = 0;
    if constexpr ((D & (D - 1)) == 0) {
        float v[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; ++i) v[i] = row < p.a.n_rows ? from[lane + 32 * i] : 0;
        rotate_lanes<D>(v, lane, p.a.signs_in, p.a.signs_out);
#pragma unroll
        for (int i = 0; i < D / 32; ++i) x[lane + 32 * i] = v[i], top = fmaxf(top, fabsf(v[i]));
    } else {
        for (int i = lane; i < D; i += 32) x[i] = row < p.a.n_rows ? from[i] : 0;
        rotate_row<D>(x, lane, p.a.signs_in, p.a.signs_out, p.a.hartley);
        for (int i = lane; i < D; i += 32) top = fmaxf(top, fabsf(x[i]));
    }
#pragma unroll
    for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    __syncwarp();
    const float f = top > 0 ? kPrefillTop / top : 0;
    WordPair out;
    if (lane < D / 4) {
#pragma unroll
        for (int b = 0; b < 4; ++b) out.put(b, __float2int_rn(x[dim_of<D>(lane, b, trellis)] * f));
    }
    const std::size_t unit = static_cast<std::size_t>(seq) * p.a.n_head_kv + head;
    uint8_t* plane = p.queries + (unit * p.n_groups + row / kGroupRows) * (2 * kQueryPlane);
    put_word(plane, row % kGroupRows, lane, out.high);
    put_word(plane + kQueryPlane, row % kGroupRows, lane, out.low);
    if (lane == 0)
        p.units[unit * p.n_groups * kGroupRows + row] =
            fmaxf(1e-30f, top * p.a.scale * 1.4426950408889634f * p.a.table[format].step / kPrefillTop);
}

/// Merges the parts of a row, takes in the sink, divides, rotates back and writes. Grid as that of make_queries.
template <int D>
__global__ void __launch_bounds__(256) finish_rows(const __grid_constant__ PrefillParams p) {
    __shared__ float rows[8][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x * 8 + warp, kv_head = blockIdx.y, seq = blockIdx.z;
    if (row >= p.a.n_rows) return;
    const int token = row / p.a.group, head = kv_head * p.a.group + row - token * p.a.group;
    const std::size_t step = static_cast<std::size_t>(p.a.n_head_kv) * p.n_groups * kGroupRows,
                      first = (static_cast<std::size_t>(seq) * p.n_parts * p.a.n_head_kv + kv_head) * p.n_groups * kGroupRows + row;
    constexpr int kEach = (D + 31) / 32;
    float top = -1e30f, all = 0, v[kEach] = {};
    for (int s = 0; s < p.n_parts; ++s) {
        const float2 ml = p.part_ml[first + s * step];
        const float now = fmaxf(top, ml.x), before = exp2_fast(top - now), by = exp2_fast(ml.x - now);
        all = fmaf(all, before, ml.y * by), top = now;
        const float* part = p.part + (first + s * step) * D;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (D % 32 == 0 || lane + 32 * i < D) v[i] = fmaf(v[i], before, part[lane + 32 * i] * by);
    }
    float f = 1;
    if (p.a.sinks) {
        const float sink = p.a.sinks[head] * 1.4426950408889634f, now = fmaxf(top, sink);
        f = exp2_fast(top - now), all = fmaf(all, f, exp2_fast(sink - now)), top = now;
    }
    f = all > 0 ? f / all : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] *= f;
    float* to = p.a.out + seq * p.a.out_seq_stride + token * p.a.out_token_stride + head * p.a.out_head_stride;
    if constexpr ((D & (D - 1)) == 0) {
        rotate_lanes<D>(v, lane, p.a.signs_out, p.a.signs_in);
#pragma unroll
        for (int i = 0; i < kEach; ++i) to[lane + 32 * i] = v[i];
    } else {
        float* x = rows[warp];
        for (int i = 0; i < kEach; ++i)
            if (lane + 32 * i < D) x[lane + 32 * i] = v[i];
        __syncwarp();
        rotate_row<D>(x, lane, p.a.signs_out, p.a.signs_in, p.a.hartley);
        for (int i = lane; i < D; i += 32) to[i] = x[i];
    }
    if (p.a.lse && lane == 0)
        p.a.lse[(static_cast<std::size_t>(seq) * p.a.n_tokens + token) * p.a.n_head + head] = all > 0 ? (top + log2f(all)) * 0.6931471805599453f : -INFINITY;
}

}  // namespace turboquant::cuda
