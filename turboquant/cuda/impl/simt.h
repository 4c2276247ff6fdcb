// What kernel bodies ask of a warp. The bodies are plain functions of their block and thread; compiled by nvcc these are instructions,
// compiled for the host they are those of an emulator (tests/cuda/simt_emulator.h), so that whole kernels are tested without a GPU.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define TQ_DEVICE __device__ __forceinline__
#define TQ_DEVICE_CALL static __device__ __noinline__
#else
#define TQ_DEVICE inline
#define TQ_DEVICE_CALL [[maybe_unused]] static
#include "tests/cuda/simt_emulator.h"
#endif

namespace turboquant::cuda {

/// A thread of a block: blocks are one-dimensional.
struct Thread {
    int index, count;
    TQ_DEVICE int lane() const { return index & 31; }
    TQ_DEVICE int warp() const { return index >> 5; }
    TQ_DEVICE int warps() const { return count >> 5; }
};

#ifdef __CUDACC__
TQ_DEVICE void sync_block() { __syncthreads(); }
TQ_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
TQ_DEVICE T shfl_xor(T v, int mask) {
    return __shfl_xor_sync(~0u, v, mask);
}
template <class T>
TQ_DEVICE T shfl(T v, int lane) {
    return __shfl_sync(~0u, v, lane);
}
TQ_DEVICE std::uint32_t ballot(bool p) { return __ballot_sync(~0u, p); }
TQ_DEVICE void atomic_xor(std::uint32_t* p, std::uint32_t v) { atomicXor(p, v); }
TQ_DEVICE void atomic_or(std::uint32_t* p, std::uint32_t v) { atomicOr(p, v); }
TQ_DEVICE int popc(std::uint32_t v) { return __popc(v); }
TQ_DEVICE int popc(std::uint64_t v) { return __popcll(v); }
TQ_DEVICE int first_bit(std::uint64_t v) { return __ffsll(static_cast<long long>(v)) - 1; }
TQ_DEVICE std::uint32_t reverse_bits(std::uint32_t v) { return __brev(v); }
/// Byte i of the result is byte (selector nibble i) of b:a; selector nibbles 0..7.
TQ_DEVICE std::uint32_t byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    std::uint32_t r;
    asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
TQ_DEVICE std::uint32_t float_bits(float v) { return __float_as_uint(v); }
TQ_DEVICE float bits_float(std::uint32_t v) { return __uint_as_float(v); }
TQ_DEVICE float reciprocal_sqrt(float v) { return rsqrtf(v); }
TQ_DEVICE std::uint16_t half_bits(float v) { return __half_as_ushort(__float2half_rn(fminf(fmaxf(v, -65504.f), 65504.f))); }
TQ_DEVICE float half_value(std::uint16_t h) { return __half2float(__ushort_as_half(h)); }
/// Four floats or two words at once, aligned to as much.
TQ_DEVICE void load_floats(const float* p, float (&v)[4]) {
    const float4 all = *reinterpret_cast<const float4*>(p);
    v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
}
TQ_DEVICE void load_words(const void* p, std::uint32_t (&v)[2]) {
    const uint2 all = *static_cast<const uint2*>(p);
    v[0] = all.x, v[1] = all.y;
}
TQ_DEVICE void store_words(std::uint32_t* p, const std::uint32_t (&v)[4]) { *reinterpret_cast<uint4*>(p) = {v[0], v[1], v[2], v[3]}; }
/// Two halves, `low` in the low one.
TQ_DEVICE std::uint32_t pack_halves(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&h);
}
TQ_DEVICE float2 unpack_halves(std::uint32_t v) { return __half22float2(*reinterpret_cast<const __half2*>(&v)); }
/// c += a * b, m16n8k16, halves, sums in float.
TQ_DEVICE void mma_halves(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Pairs of 16-bit numbers. Before sm_90 there is no such minimum of integers; as halves they have the same order below 0x7c00.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kWideMetrics = true;
TQ_DEVICE std::uint32_t min_pairs(std::uint32_t a, std::uint32_t b) { return __vminu2(a, b); }
TQ_DEVICE std::uint32_t add_min_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) { return __viaddmin_u16x2(a, b, c); }
#else
inline constexpr bool kWideMetrics = false;
TQ_DEVICE std::uint32_t min_pairs(std::uint32_t a, std::uint32_t b) {
    std::uint32_t r;
    asm("min.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
TQ_DEVICE std::uint32_t add_min_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) { return min_pairs(a + b, c); }
#endif
#else
using emulator::atomic_or, emulator::atomic_xor, emulator::ballot, emulator::mma_halves, emulator::shfl, emulator::shfl_xor;
using emulator::sync_block, emulator::sync_warp, emulator::half_bits, emulator::half_value, emulator::float2, emulator::kWideMetrics;
inline int popc(std::uint32_t v) { return std::popcount(v); }
inline int popc(std::uint64_t v) { return std::popcount(v); }
inline int first_bit(std::uint64_t v) { return std::countr_zero(v); }
inline std::uint32_t reverse_bits(std::uint32_t v) {
    std::uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= (v >> i & 1) << (31 - i);
    return r;
}
inline std::uint32_t byte_perm(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t both = static_cast<std::uint64_t>(b) << 32 | a;
    std::uint32_t r = 0;
    for (int i = 0; i < 4; ++i) r |= static_cast<std::uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return r;
}
inline std::uint32_t float_bits(float v) { return std::bit_cast<std::uint32_t>(v); }
inline float bits_float(std::uint32_t v) { return std::bit_cast<float>(v); }
inline void load_floats(const float* p, float (&v)[4]) { std::memcpy(v, p, sizeof v); }
inline void load_words(const void* p, std::uint32_t (&v)[2]) { std::memcpy(v, p, sizeof v); }
inline void store_words(std::uint32_t* p, const std::uint32_t (&v)[4]) { std::memcpy(p, v, sizeof v); }
inline float reciprocal_sqrt(float v) { return 1 / std::sqrt(v); }
inline std::uint32_t pack_halves(float low, float high) { return half_bits(low) | static_cast<std::uint32_t>(half_bits(high)) << 16; }
inline float2 unpack_halves(std::uint32_t v) {
    return {half_value(static_cast<std::uint16_t>(v)), half_value(static_cast<std::uint16_t>(v >> 16))};
}
inline std::uint32_t min_pairs(std::uint32_t a, std::uint32_t b) {
    const std::uint32_t low = (a & 0xffff) < (b & 0xffff) ? a & 0xffff : b & 0xffff;
    return low | (a >> 16 < b >> 16 ? a >> 16 : b >> 16) << 16;
}
inline std::uint32_t add_min_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) { return min_pairs(a + b, c); }
#endif

/// A value where `negative` has its bit 0 set: negated.
TQ_DEVICE float flip(float v, std::uint32_t negative) { return bits_float(float_bits(v) ^ negative << 31); }

}  // namespace turboquant::cuda
