// AVX2, FMA, F16C. See simd_scalar.h for the meaning of every operation.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

struct Simd {
    static constexpr SimdLevel kLevel = SimdLevel::avx2;
    static constexpr int kFloats = 8, kBytes = 32;
    static constexpr int kMaxRows = 4, kMaxVecs = 2;
    static constexpr int kTrellisVectors = 2;  // vectors whose trellis searches run in step
    static constexpr int kPanelBias = 0;
    static constexpr int kWeightMax = 128;  // vpmaddubsw adds two products in 16 bits: 2*128*127 just fits

    using F = __m256;
    using I = __m256i;
    using B = __m256i;
    using M = __m256;

    // bytes
    static B load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store_bytes(void* p, B v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
    template <int n>
    static B shift_right(B v) {
        return _mm256_srli_epi16(v, n);
    }
    static B load_lut(const int8_t* lut) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lut))); }
    static B lookup16(B lut, B index) { return _mm256_shuffle_epi8(lut, and_bytes(index, 15)); }
    // Bit i to all bits of byte i.
    static B spread_bits(const uint8_t* bits) {
        int32_t w;
        memcpy(&w, bits, 4);
        const B spread =
            _mm256_shuffle_epi8(_mm256_set1_epi32(w), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
        const B bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    }
    static B select_bits(const uint8_t* bits, B if0, B if1) { return _mm256_blendv_epi8(if0, if1, spread_bits(bits)); }
    static B and_bytes(B a, uint8_t mask) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask))); }
    static B or_bytes(B a, B b) { return _mm256_or_si256(a, b); }
    static B splat_bytes(uint8_t x) { return _mm256_set1_epi8(static_cast<char>(x)); }

    static B or_if_bits(const uint8_t* bits, B a, uint8_t x) { return or_bytes(a, and_bytes(spread_bits(bits), x)); }
    static B lookup16_if_bits(const uint8_t* bits, B if0, B lut, B index) { return select_bits(bits, if0, lookup16(lut, index)); }
    static B add_saturating(B a, B b) { return _mm256_adds_epu8(a, b); }
    static B sub_bytes(B a, B b) { return _mm256_sub_epi8(a, b); }
    static B min_bytes(B a, B b) { return _mm256_min_epu8(a, b); }
    static uint8_t reduce_min_bytes(B a) {
        const __m128i x = _mm_min_epu8(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return static_cast<uint8_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_min_epu8(x, _mm_srli_epi16(x, 8)))));
    }
    static void store_less(uint8_t* bits, B a, B b) {
        const uint32_t k = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(min_bytes(a, b), b)));
        memcpy(bits, &k, 4);
    }
    static void interleave(B even, B odd, B* first, B* second) {
        const B lo = _mm256_unpacklo_epi8(even, odd), hi = _mm256_unpackhi_epi8(even, odd);
        *first = _mm256_permute2x128_si256(lo, hi, 0x20);
        *second = _mm256_permute2x128_si256(lo, hi, 0x31);
    }

    // int8 dot products
    static I zero_ints() { return _mm256_setzero_si256(); }
    static I sums(const I* v) {
        const I low = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        const I high = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
    }
    static B splat_dword(const uint8_t* p) {
        int32_t x;
        memcpy(&x, p, 4);
        return _mm256_set1_epi32(x);
    }
    static I add_pairs(I acc, I words) { return _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1))); }
    // |panel| * (query with the panel's sign): both magnitudes <= 127, so no pair saturates.
    static I dot_key(I acc, B panel, B query) {
        return add_pairs(acc, _mm256_maddubs_epi16(_mm256_abs_epi8(panel), _mm256_sign_epi8(query, panel)));
    }
    static I dot_value(I acc, B weights, B panel) { return add_pairs(acc, _mm256_maddubs_epi16(weights, panel)); }
    static void store_ints(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static F load_ints(const int32_t* p) { return _mm256_cvtepi32_ps(load_bytes(p)); }
    static F to_floats(I v) { return _mm256_cvtepi32_ps(v); }

    // floats
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F splat(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F scale_exp2(F a, F n) {
        const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
    }
    static M greater_equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
    static F add_if(M m, F a, F b) { return _mm256_add_ps(a, _mm256_and_ps(m, b)); }
    static F select(M m, F if0, F if1) { return _mm256_blendv_ps(if0, if1, m); }
    static float reduce_max(F a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }
    static float reduce_add(F a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    // Lane i: i & h ? v[i ^ h] - v[i] : v[i] + v[i ^ h].
    template <int h>
    static F butterfly(F v) {
        F w;
        if constexpr (h == 1) w = _mm256_permute_ps(v, 0xb1);
        if constexpr (h == 2) w = _mm256_permute_ps(v, 0x4e);
        if constexpr (h == 4) w = _mm256_permute2f128_ps(v, v, 1);
        constexpr int odd = h == 1 ? 0xaa : h == 2 ? 0xcc : 0xf0;
        return _mm256_blend_ps(_mm256_add_ps(v, w), _mm256_sub_ps(w, v), odd);
    }

    static F reverse(F v) { return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0)); }

    // conversions of kFloats values
    static F load_halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static F load_int8(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    static void store_halves(uint16_t* p, F v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_as_bytes(uint8_t* p, F v) {
        const __m256i i = _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(255));
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    }
    // Of n entries (a multiple of 8); the bits of i above the index may be anything.
    template <int n>
    static F lookup(const float* table, I i) {
        static_assert(n == 8 || n == 16 || n == 32);
        if constexpr (n == 8) {
            return _mm256_permutevar8x32_ps(load(table), i);
        } else {
            const F odd = _mm256_castsi256_ps(_mm256_slli_epi32(i, n == 16 ? 28 : 27));  // the index's top bit as a sign
            return _mm256_blendv_ps(lookup<n / 2>(table, i), lookup<n / 2>(table + n / 2, i), odd);
        }
    }
    // The upper half of a codebook is looked up, the lower mirrored: faster than a gather up to 6 bits.
    template <int bits>
    static F lookup_floats(const float* table, const uint8_t* index) {
        const I i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
        if constexpr (bits == 8) {
            return _mm256_i32gather_ps(table, i, 4);
        } else {
            constexpr int half = 1 << (bits - 1);
            const I below = _mm256_cmpgt_epi32(_mm256_set1_epi32(half), i);
            const F x = lookup<half>(table + half, _mm256_xor_si256(i, below));
            return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(below), splat(-0.0f)));
        }
    }
};

}  // namespace
}  // namespace turboquant
