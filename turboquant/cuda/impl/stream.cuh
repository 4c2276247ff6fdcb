// Formats chosen at run time, and the tiles of one side of a block's work on their way into registers.
#pragma once

#include "turboquant/cuda/impl/formats.cuh"

namespace turboquant::cuda {

/// Calls f.template operator()<codec>() for the format of an index into kFragmentCodecs: kFormat if the kernel knows it, else `index`,
/// uniform in the block.
template <int kFormat, class F>
__device__ __forceinline__ void for_format(int index, F&& f) {
    if constexpr (kFormat != kAnyFormat) {
        return f.template operator()<kFragmentCodecs[kFormat]>();
    } else switch (index) {
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
template <int D, int kFormat>
struct TileStream {
    const uint8_t* tiles;
    std::size_t stride;
    int format;
    __device__ __forceinline__ TileStream(const SideParams& s, int seq, int head) {
        format = kFormat != kAnyFormat ? kFormat : s.codec;
        tiles = s.tiles + seq * s.seq_stride;
        if (kFormat == kAnyFormat && s.head_codec) {
            format = uniform(s.head_codec[head]);
            const std::size_t at = s.head_at[head];
            tiles += static_cast<std::size_t>(static_cast<unsigned>(uniform(static_cast<int>(at >> 31)))) << 31 | static_cast<unsigned>(uniform(static_cast<int>(at & 0x7fffffff)));
        } else {
            tiles += head * s.head_stride;
        }
        stride = s.tile_stride;
    }
    __device__ __forceinline__ bool is_raw() const { return format_is_raw(format); }
    __device__ __forceinline__ int bits() const { return is_raw() ? 16 : format_bits(format); }
    __device__ __forceinline__ int n_chunks() const { return D / 16 * bits() / 4; }
    __device__ __forceinline__ int code_bytes() const { return 8 * D * bits(); }
    __device__ __forceinline__ int scales_at() const { return is_raw() ? 0 : code_bytes(); }  // raw has none: anything is read
};

/// First chunks of a lane and the scales of its keys.
template <int kAhead>
struct Ahead {
    uint4 chunk[kAhead], scales;

    template <class S>
    __device__ __forceinline__ void load(const S& s, const uint8_t* p, int lane) {
#pragma unroll
        for (int c = 0; c < kAhead; ++c)
            if (c < s.n_chunks()) chunk[c] = load_streaming(p + c * 512 + lane * 16);
        scales = load_streaming(p + s.scales_at() + (lane >> 2) * 16);
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

}  // namespace turboquant::cuda
