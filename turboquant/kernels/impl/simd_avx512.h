// AVX-512 (F, BW, VL, DQ, VBMI, VNNI). See simd_scalar.h for the meaning of every operation.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

struct Simd {
    static constexpr SimdLevel kLevel = SimdLevel::avx512;
    static constexpr int kFloats = 16, kBytes = 64;
    static constexpr int kMaxRows = 6, kMaxVecs = 4;
    static constexpr int kTrellisVectors = 2;  // vectors whose trellis searches run in step
    static constexpr int kPanelBias = 128;     // vpdpbusd multiplies unsigned by signed: keys are stored + 128
    static constexpr int kWeightMax = 255;

    using F = __m512;
    using I = __m512i;
    using B = __m512i;
    using M = __mmask16;

    // bytes
    static B load_bytes(const void* p) { return _mm512_loadu_si512(p); }
    static void store_bytes(void* p, B v) { _mm512_storeu_si512(p, v); }
    template <int n>
    static B shift_right(B v) {
        return _mm512_srli_epi16(v, n);
    }
    // vpermb reads the low 6 bits of an index; a table of 4 copies makes it read 4.
    static B load_lut(const int8_t* lut) { return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut))); }
    static B lookup16(B lut, B index) { return _mm512_permutexvar_epi8(index, lut); }
    static B select_bits(const uint8_t* bits, B if0, B if1) {
        uint64_t k;
        memcpy(&k, bits, 8);
        return _mm512_mask_blend_epi8(k, if0, if1);
    }
    static B and_bytes(B a, uint8_t mask) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask))); }
    static B or_bytes(B a, B b) { return _mm512_or_si512(a, b); }
    static B splat_bytes(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }

    static __mmask64 load_mask(const uint8_t* bits) {
        uint64_t k;
        memcpy(&k, bits, 8);
        return k;
    }
    static B or_if_bits(const uint8_t* bits, B a, uint8_t x) {
        return _mm512_mask_add_epi8(a, load_mask(bits), a, splat_bytes(x));
    }  // the bit is not set in a
    static B lookup16_if_bits(const uint8_t* bits, B if0, B lut, B index) {
        return _mm512_mask_permutexvar_epi8(if0, load_mask(bits), index, lut);
    }
    static B add_saturating(B a, B b) { return _mm512_adds_epu8(a, b); }
    static B sub_bytes(B a, B b) { return _mm512_sub_epi8(a, b); }
    static B min_bytes(B a, B b) { return _mm512_min_epu8(a, b); }
    static uint8_t reduce_min_bytes(B a) {
        const __m256i x = _mm256_min_epu8(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
        const __m128i y = _mm_min_epu8(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        return static_cast<uint8_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_min_epu8(y, _mm_srli_epi16(y, 8)))));
    }
    static void store_less(uint8_t* bits, B a, B b) {
        const uint64_t k = _mm512_cmplt_epu8_mask(a, b);
        memcpy(bits, &k, 8);
    }
    static void interleave(B even, B odd, B* first, B* second) {
        alignas(64) static constexpr uint8_t order[64] = {
            0,  64, 1,  65, 2,  66, 3,  67, 4,  68, 5,  69, 6,  70, 7,  71, 8,  72, 9,  73, 10, 74, 11, 75, 12, 76, 13, 77, 14, 78, 15, 79,
            16, 80, 17, 81, 18, 82, 19, 83, 20, 84, 21, 85, 22, 86, 23, 87, 24, 88, 25, 89, 26, 90, 27, 91, 28, 92, 29, 93, 30, 94, 31, 95};
        const B low = load_bytes(order);
        *first = _mm512_permutex2var_epi8(even, low, odd);
        *second = _mm512_permutex2var_epi8(even, or_bytes(low, splat_bytes(32)), odd);
    }

    // int8 dot products
    static I zero_ints() { return _mm512_setzero_si512(); }
    // Within 128 bits: two vectors' sums side by side, then four's.
    static I sums2(I a, I b) { return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)); }
    static I sums4(const I* v) {
        const I a = sums2(v[0], v[1]), b = sums2(v[2], v[3]);
        return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    }
    static I add_halves(I a, I b) { return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)); }
    static I sums(const I* v) { return add_halves(add_halves(sums4(v), sums4(v + 4)), add_halves(sums4(v + 8), sums4(v + 12))); }
    static B splat_dword(const uint8_t* p) {
        int32_t x;
        memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static I dot_key(I acc, B panel, B query) { return _mm512_dpbusd_epi32(acc, panel, query); }
    static I dot_value(I acc, B weights, B panel) { return _mm512_dpbusd_epi32(acc, weights, panel); }
    static void store_ints(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static F load_ints(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
    static F to_floats(I v) { return _mm512_cvtepi32_ps(v); }

    // floats
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F splat(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale_exp2(F a, F n) { return _mm512_scalef_ps(a, n); }
    static M greater_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static F add_if(M m, F a, F b) { return _mm512_mask_add_ps(a, m, a, b); }
    static F select(M m, F if0, F if1) { return _mm512_mask_blend_ps(m, if0, if1); }
    static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
    static float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
    // Lane i: i & h ? v[i ^ h] - v[i] : v[i] + v[i ^ h].
    template <int h>
    static F butterfly(F v) {
        F w;
        if constexpr (h == 1) w = _mm512_permute_ps(v, 0xb1);
        if constexpr (h == 2) w = _mm512_permute_ps(v, 0x4e);
        if constexpr (h == 4) w = _mm512_shuffle_f32x4(v, v, 0xb1);
        if constexpr (h == 8) w = _mm512_shuffle_f32x4(v, v, 0x4e);
        constexpr __mmask16 odd = h == 1 ? 0xaaaa : h == 2 ? 0xcccc : h == 4 ? 0xf0f0 : 0xff00;
        return _mm512_mask_sub_ps(_mm512_add_ps(v, w), odd, w, v);
    }

    static F reverse(F v) { return _mm512_permutexvar_ps(_mm512_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), v); }

    // conversions of kFloats values
    static F load_halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static F load_int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store_halves(uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_as_bytes(uint8_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    static F lookup32(const float* table, I i) { return _mm512_permutex2var_ps(load(table), i, load(table + 16)); }
    static F lookup64(const float* table, I i) {
        return _mm512_mask_blend_ps(_mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), lookup32(table, i), lookup32(table + 32, i));
    }
    // The upper half of an 8-bit codebook is looked up, the lower mirrored: four times as fast as a gather.
    template <int bits>
    static F lookup_floats(const float* table, const uint8_t* index) {
        const I i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index)));
        if constexpr (bits <= 5) return lookup32(table, i);
        if constexpr (bits == 6) return lookup64(table, i);
        const M below = _mm512_testn_epi32_mask(i, _mm512_set1_epi32(128));
        const I j = _mm512_mask_xor_epi32(i, below, i, _mm512_set1_epi32(127));
        const F x =
            _mm512_mask_blend_ps(_mm512_test_epi32_mask(j, _mm512_set1_epi32(64)), lookup64(table + 128, j), lookup64(table + 192, j));
        return _mm512_mask_xor_ps(x, below, x, splat(-0.0f));
    }
};

}  // namespace
}  // namespace turboquant
