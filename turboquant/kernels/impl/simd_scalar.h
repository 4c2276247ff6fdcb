// The operations that the kernels are written in, in plain C++: the fallback level and the definition of what the other levels must do.
//   F: kFloats floats.  I: kFloats int32.  B: kBytes = 4*kFloats bytes.  M: a lane mask for F.
#pragma once

#include <stdint.h>
#include <string.h>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

struct Simd {
    static constexpr SimdLevel kLevel = SimdLevel::scalar;
    static constexpr int kFloats = 8, kBytes = 32;
    static constexpr int kMaxRows = 4, kMaxVecs = 2;  // register block of the matrix products
    static constexpr int kTrellisVectors = 1;         // vectors whose trellis searches run in step
    static constexpr int kPanelBias = 0;              // added to the bytes of key panels
    static constexpr int kWeightMax = 255;            // softmax weights are quantized to 0..kWeightMax, in a byte

    struct F {
        float v[kFloats];
    };
    struct I {
        int32_t v[kFloats];
    };
    struct B {
        uint8_t v[kBytes];
    };
    struct M {
        bool v[kFloats];
    };

    template <class Op>
    static F each(Op op) {
        F r;
        for (int i = 0; i < kFloats; ++i) r.v[i] = op(i);
        return r;
    }

    // bytes
    static B load_bytes(const void* p) {
        B r;
        memcpy(r.v, p, kBytes);
        return r;
    }
    static void store_bytes(void* p, const B& v) { memcpy(p, v.v, kBytes); }
    // Shifts 16-bit lanes or bytes: the bits shifted in are anything.
    template <int n>
    static B shift_right(B v) {
        for (uint8_t& x : v.v) x = static_cast<uint8_t>(x >> n);
        return v;
    }
    static B load_lut(const int8_t* lut) {
        B r;
        memcpy(r.v, lut, 16);
        return r;
    }
    // Reads the low 4 bits of each index; the others may be anything.
    static B lookup16(const B& lut, B index) {
        for (uint8_t& x : index.v) x = lut.v[x & 15];
        return index;
    }
    // Byte i: bit i of `bits` ? if1 : if0.
    static B select_bits(const uint8_t* bits, B if0, const B& if1) {
        for (int i = 0; i < kBytes; ++i)
            if (bits[i / 8] >> i % 8 & 1) if0.v[i] = if1.v[i];
        return if0;
    }
    static B and_bytes(B a, uint8_t mask) {
        for (uint8_t& x : a.v) x &= mask;
        return a;
    }
    static B or_bytes(B a, const B& b) {
        for (int i = 0; i < kBytes; ++i) a.v[i] |= b.v[i];
        return a;
    }
    static B splat_bytes(uint8_t x) {
        B r;
        memset(r.v, x, kBytes);
        return r;
    }

    // Byte i: bit i of `bits` ? a | x : a.
    static B or_if_bits(const uint8_t* bits, B a, uint8_t x) { return select_bits(bits, a, or_bytes(a, splat_bytes(x))); }
    // Byte i: bit i of `bits` ? lookup16(lut, index) : if0.
    static B lookup16_if_bits(const uint8_t* bits, const B& if0, const B& lut, const B& index) {
        return select_bits(bits, if0, lookup16(lut, index));
    }
    static B add_saturating(B a, const B& b) {
        for (int i = 0; i < kBytes; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + b.v[i] > 255 ? 255 : a.v[i] + b.v[i]);
        return a;
    }
    static B sub_bytes(B a, const B& b) {
        for (int i = 0; i < kBytes; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] - b.v[i]);
        return a;
    }
    static B min_bytes(B a, const B& b) {
        for (int i = 0; i < kBytes; ++i) a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i];
        return a;
    }
    static uint8_t reduce_min_bytes(const B& a) {
        uint8_t r = 255;
        for (uint8_t x : a.v) r = x < r ? x : r;
        return r;
    }
    // kBytes bits: a < b.
    static void store_less(uint8_t* bits, const B& a, const B& b) {
        for (int o = 0; o < kBytes; o += 8) {
            bits[o / 8] = 0;
            for (int i = 0; i < 8; ++i) bits[o / 8] = static_cast<uint8_t>(bits[o / 8] | (a.v[o + i] < b.v[o + i]) << i);
        }
    }
    // even[0] odd[0] even[1] odd[1] ...
    static void interleave(const B& even, const B& odd, B* first, B* second) {
        for (int i = 0; i < kBytes / 2; ++i) {
            first->v[2 * i] = even.v[i], first->v[2 * i + 1] = odd.v[i];
            second->v[2 * i] = even.v[kBytes / 2 + i], second->v[2 * i + 1] = odd.v[kBytes / 2 + i];
        }
    }

    // int8 dot products of 4 adjacent bytes, added to int32 lanes: query signed, weights 0..kWeightMax, panel signed (+ kPanelBias for
    // keys)
    static I zero_ints() { return {}; }
    // Lane i: all lanes of v[i] added up, kFloats of them.
    static I sums(const I* v) {
        I r = {};
        for (int i = 0; i < kFloats; ++i)
            for (const int32_t x : v[i].v) r.v[i] += x;
        return r;
    }
    static B splat_dword(const uint8_t* p) {
        B r;
        for (int i = 0; i < kBytes; ++i) r.v[i] = p[i % 4];
        return r;
    }
    static I dot_key(I acc, const B& panel, const B& query) {
        for (int i = 0; i < kBytes; ++i) acc.v[i / 4] += static_cast<int8_t>(panel.v[i]) * static_cast<int8_t>(query.v[i]);
        return acc;
    }
    static I dot_value(I acc, const B& weights, const B& panel) {
        for (int i = 0; i < kBytes; ++i) acc.v[i / 4] += weights.v[i] * static_cast<int8_t>(panel.v[i]);
        return acc;
    }
    static void store_ints(int32_t* p, const I& v) { memcpy(p, v.v, sizeof v.v); }
    static F load_ints(const int32_t* p) {
        return each([&](int i) { return static_cast<float>(p[i]); });
    }
    static F to_floats(const I& v) { return load_ints(v.v); }

    // floats
    static F load(const float* p) {
        F r;
        memcpy(r.v, p, sizeof r.v);
        return r;
    }
    static void store(float* p, const F& v) { memcpy(p, v.v, sizeof v.v); }
    static F splat(float x) {
        return each([&](int) { return x; });
    }
    static F add(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    static F sub(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    static F mul(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    static F div(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] / b.v[i]; });
    }
    static F fma(const F& a, const F& b, const F& c) {
        return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static F max(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static F min(const F& a, const F& b) {
        return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    static F abs(const F& a) {
        return each([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
    }
    // To the nearest integer; |a| < 2^22.
    static F round(const F& a) {
        return each([&](int i) { return (a.v[i] + 12582912.f) - 12582912.f; });
    }
    // a * 2^n for integers n in -127..127; n = -127 may give 0.
    static F scale_exp2(const F& a, const F& n) {
        return each([&](int i) {
            const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
            float power;
            memcpy(&power, &bits, 4);
            return a.v[i] * power;
        });
    }
    static M greater_equal(const F& a, const F& b) {
        M m;
        for (int i = 0; i < kFloats; ++i) m.v[i] = a.v[i] >= b.v[i];
        return m;
    }
    static F add_if(const M& m, const F& a, const F& b) {
        return each([&](int i) { return m.v[i] ? a.v[i] + b.v[i] : a.v[i]; });
    }
    static F select(const M& m, const F& if0, const F& if1) {
        return each([&](int i) { return m.v[i] ? if1.v[i] : if0.v[i]; });
    }
    static float reduce_max(const F& a) {
        float r = a.v[0];
        for (float x : a.v) r = x > r ? x : r;
        return r;
    }
    static float reduce_add(const F& a) {
        float r = 0;
        for (float x : a.v) r += x;
        return r;
    }
    // Lane i: i & h ? v[i ^ h] - v[i] : v[i] + v[i ^ h].
    template <int h>
    static F butterfly(const F& v) {
        return each([&](int i) { return i & h ? v.v[i ^ h] - v.v[i] : v.v[i] + v.v[i ^ h]; });
    }

    static F reverse(const F& v) {
        return each([&](int i) { return v.v[kFloats - 1 - i]; });
    }

    // conversions of kFloats values
    static F load_halves(const uint16_t* p) {
        return each([&](int i) { return from_half(p[i]); });
    }
    static F load_int8(const int8_t* p) {
        return each([&](int i) { return static_cast<float>(p[i]); });
    }
    static void store_halves(uint16_t* p, const F& v) {
        for (int i = 0; i < kFloats; ++i) p[i] = to_half(v.v[i]);
    }
    // Rounded to integers, low byte.
    static void store_as_bytes(uint8_t* p, const F& v) {
        const F r = round(v);
        for (int i = 0; i < kFloats; ++i) p[i] = static_cast<uint8_t>(static_cast<int32_t>(r.v[i]));
    }
    // table[index[i]], index < 2^bits.
    template <int bits>
    static F lookup_floats(const float* table, const uint8_t* index) {
        return each([&](int i) { return table[index[i]]; });
    }
};

}  // namespace
}  // namespace turboquant
