// AArch64 NEON with the dot-product extension. See simd_scalar.h for the meaning of every operation.
#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

struct Simd {
    static constexpr SimdLevel kLevel = SimdLevel::neon;
    static constexpr int kFloats = 4, kBytes = 16;
    static constexpr int kMaxRows = 6, kMaxVecs = 4;
    static constexpr int kTrellisVectors = 2;  // vectors whose trellis searches run in step
    static constexpr int kPanelBias = 0;
    static constexpr int kWeightMax = 127;  // sdot is signed by signed

    using F = float32x4_t;
    using I = int32x4_t;
    using B = uint8x16_t;
    using M = uint32x4_t;

    // bytes
    static B load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
    static void store_bytes(void* p, B v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
    template <int n>
    static B shift_right(B v) {
        return vshrq_n_u8(v, n);
    }
    static B load_lut(const int8_t* lut) { return vreinterpretq_u8_s8(vld1q_s8(lut)); }
    static B lookup16(B lut, B index) { return vqtbl1q_u8(lut, vandq_u8(index, vdupq_n_u8(15))); }
    static B select_bits(const uint8_t* bits, B if0, B if1) {
        const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
        return vbslq_u8(vtstq_u8(vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1])), bit), if1, if0);
    }
    static B and_bytes(B a, uint8_t mask) { return vandq_u8(a, vdupq_n_u8(mask)); }
    static B or_bytes(B a, B b) { return vorrq_u8(a, b); }
    static B splat_bytes(uint8_t x) { return vdupq_n_u8(x); }

    static B or_if_bits(const uint8_t* bits, B a, uint8_t x) { return select_bits(bits, a, or_bytes(a, splat_bytes(x))); }
    static B lookup16_if_bits(const uint8_t* bits, B if0, B lut, B index) { return select_bits(bits, if0, lookup16(lut, index)); }
    static B add_saturating(B a, B b) { return vqaddq_u8(a, b); }
    static B sub_bytes(B a, B b) { return vsubq_u8(a, b); }
    static B min_bytes(B a, B b) { return vminq_u8(a, b); }
    static uint8_t reduce_min_bytes(B a) { return vminvq_u8(a); }
    static void store_less(uint8_t* bits, B a, B b) {
        const B bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)), k = vandq_u8(vcltq_u8(a, b), bit);
        bits[0] = vaddv_u8(vget_low_u8(k)), bits[1] = vaddv_u8(vget_high_u8(k));
    }
    static void interleave(B even, B odd, B* first, B* second) { *first = vzip1q_u8(even, odd), *second = vzip2q_u8(even, odd); }

    // int8 dot products
    static I zero_ints() { return vdupq_n_s32(0); }
    static I sums(const I* v) { return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])); }
    static B splat_dword(const uint8_t* p) {
        uint32_t x;
        memcpy(&x, p, 4);
        return vreinterpretq_u8_u32(vdupq_n_u32(x));
    }
    static I dot_key(I acc, B panel, B query) { return vdotq_s32(acc, vreinterpretq_s8_u8(panel), vreinterpretq_s8_u8(query)); }
    static I dot_value(I acc, B weights, B panel) { return dot_key(acc, panel, weights); }
    static void store_ints(int32_t* p, I v) { vst1q_s32(p, v); }
    static F load_ints(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
    static F to_floats(I v) { return vcvtq_f32_s32(v); }

    // floats
    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F v) { vst1q_f32(p, v); }
    static F splat(float x) { return vdupq_n_f32(x); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F abs(F a) { return vabsq_f32(a); }
    static F round(F a) { return vrndnq_f32(a); }
    static F scale_exp2(F a, F n) {
        return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
    }
    static M greater_equal(F a, F b) { return vcgeq_f32(a, b); }
    static F add_if(M m, F a, F b) { return vaddq_f32(a, vreinterpretq_f32_u32(vandq_u32(m, vreinterpretq_u32_f32(b)))); }
    static F select(M m, F if0, F if1) { return vbslq_f32(m, if1, if0); }
    static float reduce_max(F a) { return vmaxvq_f32(a); }
    static float reduce_add(F a) { return vaddvq_f32(a); }
    // Lane i: i & h ? v[i ^ h] - v[i] : v[i] + v[i ^ h].
    template <int h>
    static F butterfly(F v) {
        const F w = h == 1 ? vrev64q_f32(v) : vextq_f32(v, v, 2);
        const F sign = h == 1 ? F{1, -1, 1, -1} : F{1, 1, -1, -1};
        return vfmaq_f32(w, v, sign);
    }
    static F reverse(F v) {
        const F pairs = vrev64q_f32(v);
        return vextq_f32(pairs, pairs, 2);
    }

    // conversions of kFloats values
    static F load_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static F load_int8(const int8_t* p) { return F{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
    static void store_halves(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
    static void store_as_bytes(uint8_t* p, F v) {
        const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(vcvtnq_s32_f32(v)));
        const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
        memcpy(p, &bytes, 4);
    }
    template <int bits>
    static F lookup_floats(const float* table, const uint8_t* index) {
        return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
    }
};

}  // namespace
}  // namespace turboquant
