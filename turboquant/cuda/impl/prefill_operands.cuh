// Operands of prefill attention: codes become panels of bytes. Once per call, for all query rows.
#pragma once

#include "turboquant/cuda/impl/formats.cuh"
#include "turboquant/cuda/impl/wide_keys.cuh"

namespace turboquant::cuda {

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

/// One panel per block: of its first four warps two have a tile of keys each, two of values. Wide keys are the work of all.
/// grid: panels, kv heads, sequences.
template <int D, bool kWide>
__global__ void __launch_bounds__(32 * panel_warps(kWide), kWide ? 2 : 7) make_panels(const __grid_constant__ PrefillParams p) {
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
    PanelKeys<D, kWide> wide(p, seq, head, panel, n_kv, warp, lane, reinterpret_cast<uint8_t*>(lut + 512));
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
        wide.run(image + l.keys, reinterpret_cast<float*>(image + l.key_scales));
    }
    __syncthreads();
    uint4* out = reinterpret_cast<uint4*>(p.panels + ((static_cast<std::size_t>(seq) * p.a.n_head_kv + head) * p.n_panels + panel) * l.bytes);
    for (int i = threadIdx.x; i < l.bytes / 16; i += 32 * panel_warps(kWide)) out[i] = reinterpret_cast<const uint4*>(image)[i];
}

}  // namespace turboquant::cuda
