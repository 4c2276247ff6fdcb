// From the words of a lane (fragment_order.h) to operand bytes: eight values of an octet become two registers, places 0..3 and 4..7.
#pragma once

#include "turboquant/codec/trellis.h"
#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/impl/params.h"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {

/// How the levels of a format are made of operand bytes.
enum class Operands {
    one,     ///< the bytes are the levels
    sum,     ///< the level is the sum of two bytes: 16 levels by two tables of 8, of which the one that is not meant gives its sign (0 or -1)
    signs,   ///< the level is the first byte minus the second (0 or -1): magnitudes, inverted where negative
    wide,    ///< 256 * the second byte + the first
    halves,  ///< fp16 values, no look-up
};

constexpr Operands operands_of(CodecId f) {
    switch (f) {
        case CodecId::turbo4:
        case CodecId::tcq3:
            return Operands::sum;
        case CodecId::tcq4:
            return Operands::signs;
        case CodecId::turbo5:
        case CodecId::turbo6:
        case CodecId::turbo8:
            return Operands::wide;
        case CodecId::raw:
            return Operands::halves;
        default:
            return Operands::one;
    }
}
constexpr bool is_trellis(CodecId f) { return codec_info(f).family == Family::trellis; }
constexpr int bits_of(CodecId f) { return codec_info(f).bits; }

/// The words of one lane of a tile. Whole 16-byte chunks 0..kAhead-1 were loaded a tile ahead; the others are loaded one stage before they
/// are used. Stages: pairs of keys, rows of values, pairs of rows of trellis keys. Everything folds once the loops are unrolled.
template <CodecId F, Side kSide, int D, int kAhead>
struct LaneWords {
    static constexpr int n = fragment_rows(D), kBits = codec_info(F).bits, kWords = n * kBits, kWhole = kWords / 4, kChunks = (kWords + 3) / 4;
    static constexpr bool kTrellis = codec_info(F).family == Family::trellis;
    uint4 chunk[kChunks];

    /// First stage that reads chunk c; -1: it is wanted before all stages.
    static constexpr int stage_of(int c) {
        if (kTrellis) {
            if (4 * c < n) return -1;
            const int row = (4 * c - n) / (kBits > 1 ? kBits - 1 : 1);
            return kSide == Side::key ? row / 2 : row;
        }
        const int row = 4 * c / kBits;
        return kSide == Side::key ? 4 * row / n : row;
    }

    __device__ __forceinline__ LaneWords(const uint8_t* tile, int lane, const uint4 (&ahead)[kAhead]) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            if (c < kAhead && c < kWhole)
                chunk[c] = ahead[c];
            else if (stage_of(c) < 1)
                load(tile, lane, c);
        }
    }
    /// While a stage is at work.
    __device__ __forceinline__ void load_next(const uint8_t* tile, int lane, int stage) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            if (!(c < kAhead && c < kWhole) && stage_of(c) == stage + 1) load(tile, lane, c);
    }
    __device__ __forceinline__ uint32_t operator[](int w) const {
        const uint4& c = chunk[w / 4];
        return w % 4 == 0 ? c.x : w % 4 == 1 ? c.y : w % 4 == 2 ? c.z : c.w;
    }

  private:
    __device__ __forceinline__ void load(const uint8_t* tile, int lane, int c) {
        if (c < kWhole) {
            chunk[c] = load_streaming(tile + c * 512 + lane * 16);
        } else {
            const uint8_t* p = tile + c * 512 + lane * 4;
            chunk[c].x = load_word(p);
            if (kWords % 4 > 1) chunk[c].y = load_word(p + 128);
            if (kWords % 4 > 2) chunk[c].z = load_word(p + 256);
        }
    }
};

__device__ __forceinline__ void look_up_4(uint32_t t, uint32_t s, uint32_t (&r)[2]) { r[0] = prmt(t, t, s), r[1] = prmt(t, t, s >> 16); }
__device__ __forceinline__ void look_up_8(const uint32_t* t, uint32_t s, uint32_t (&r)[2]) {
    r[0] = prmt(t[0], t[1], s), r[1] = prmt(t[0], t[1], s >> 16);
}
__device__ __forceinline__ void look_up_16(const uint32_t* t, uint32_t s, uint32_t (&r)[2], uint32_t (&r2)[2]) {
    const uint32_t v = s ^ 0x88888888u;
    r[0] = prmt(t[0], t[1], s), r[1] = prmt(t[0], t[1], s >> 16);
    r2[0] = prmt(t[2], t[3], v), r2[1] = prmt(t[2], t[3], v >> 16);
}

/// 16-bit levels of four values from shared memory (entries: low byte, high byte), given four times their codes.
__device__ __forceinline__ void look_up_wide(const uint32_t* lut, uint32_t i0, uint32_t i1, uint32_t i2, uint32_t i3, uint32_t& lo, uint32_t& hi) {
    const auto at = [&](uint32_t i) { return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(lut) + i); };
    const uint32_t a = prmt(at(i0), at(i1), 0x5140), b = prmt(at(i2), at(i3), 0x5140);
    lo = prmt(a, b, 0x5410), hi = prmt(a, b, 0x7632);
}

/// Subset bits of a row of a trellis format; unused otherwise. y[k%2] holds 2 bits at 4j + 2(k/2): z0^z1, z1.
struct Subsets {
    uint32_t y[2];
};
/// u[0] the trellis bits of the row, u[-i] those of the value i dims before.
__device__ __forceinline__ Subsets subsets(const uint32_t* u, uint32_t flip) {
    static_assert(kTrellisH0 == 0235 && kTrellisH1 == 0126, "the XORs below are this code's");
    const uint32_t x = xor3(u[0], u[-3], u[-7]), z1 = xor3(x, u[-2], u[-4]) ^ flip, zx = xor3(x, u[-1], u[-6]);
    return {{select(zx, z1 << 1, 0x55555555u), select(zx >> 1, z1, 0x55555555u)}};
}

/// Octet k of a row. r: the first bytes, r2: the second ones, if the format has any. kRow: row of the lane.
template <CodecId F, int D, class Words>
__device__ __forceinline__ void octet(const uint32_t* table, const uint32_t* lut, const Words& w, int row, int k, const Subsets& z, uint32_t (&r)[2],
                                      uint32_t (&r2)[2]) {
    constexpr int kBits = bits_of(F), n = fragment_rows(D);
    const int at = is_trellis(F) ? n + (kBits - 1) * row : kBits * row;
    if constexpr (F == CodecId::turbo2) {
        look_up_4(table[0], (k & 1 ? w[at + k / 2] >> 2 : w[at + k / 2]) & 0x33333333u, r);
    } else if constexpr (F == CodecId::turbo3) {
        look_up_8(table, k < 3 ? w[at + k] & 0x77777777u : (w[at] >> 3 & 0x11111111u) | (w[at + 1] >> 2 & 0x22222222u) | (w[at + 2] >> 1 & 0x44444444u), r);
    } else if constexpr (F == CodecId::turbo4) {
        look_up_16(table, w[at + k], r, r2);
    } else if constexpr (F == CodecId::turbo5 || F == CodecId::turbo6) {
        const uint32_t c = w[at + k], p = F == CodecId::turbo5 ? w[at + 4] >> k : w[at + 4 + k / 2] >> 2 * (k & 1), high = F == CodecId::turbo5 ? 1 : 3;
        const auto index = [&](int j) { return ((j ? c >> (4 * j - 2) : c << 2) & 60) | (p >> 4 * j & high) << 6; };
#pragma unroll
        for (int h = 0; h < 2; ++h) look_up_wide(lut, index(4 * h), index(4 * h + 1), index(4 * h + 2), index(4 * h + 3), r[h], r2[h]);
    } else if constexpr (F == CodecId::turbo8) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t c = w[at + 2 * k + h];
            look_up_wide(lut, c << 2 & 1020, c >> 6 & 1020, c >> 14 & 1020, c >> 22 & 1020, r[h], r2[h]);
        }
    } else if constexpr (F == CodecId::tcq1) {
        look_up_4(table[0], (k < 2 ? z.y[k] : z.y[k - 2] >> 2) & 0x33333333u, r);
    } else if constexpr (F == CodecId::tcq2) {
        const uint32_t p = w[at], y = k < 2 ? z.y[k] : z.y[k - 2] >> 2;
        const uint32_t point = k == 0 ? p : k == 1 ? p >> 1 : k == 2 ? p << 2 : p << 1;
        look_up_8(table, select(y, point, 0x33333333u) & 0x77777777u, r);
    } else if constexpr (F == CodecId::tcq3) {
        const uint32_t p = w[at + (k & 1)], y = z.y[k & 1];
        look_up_16(table + 4 * (k >> 1), k < 2 ? select(y, p, 0x33333333u) : select(p, y, 0x33333333u), r, r2);
    } else if constexpr (F == CodecId::tcq4) {
        const uint32_t n0 = w[at], p = w[at + 1 + (k & 1)], y = z.y[k & 1];
        uint32_t a[2], b[2];
        look_up_16(table + 4 * (k >> 1), k < 2 ? select(y, p, 0x33333333u) : select(p, y, 0x33333333u), a, b);
        const uint32_t even = n0 << (7 - k), odd = n0 << (3 - k);
        r2[0] = prmt(even, odd, 0xD9C8), r2[1] = prmt(even, odd, 0xFBEA);
        r[0] = lop3<(0xF0 | 0xCC) ^ 0xAA>(a[0], b[0], r2[0]), r[1] = lop3<(0xF0 | 0xCC) ^ 0xAA>(a[1], b[1], r2[1]);
    } else if constexpr (F == CodecId::tcq5) {
        const uint32_t p = w[at + k], y = k < 2 ? z.y[k] : z.y[k - 2] >> 2;
        const auto index = [&](int j) { return ((j ? p >> (4 * j - 2) : p << 2) & 60) | (y >> 4 * j & 3) << 6; };
        uint32_t unused;
#pragma unroll
        for (int h = 0; h < 2; ++h) look_up_wide(lut, index(4 * h), index(4 * h + 1), index(4 * h + 2), index(4 * h + 3), r[h], unused);
    }
}

/// Trellis bits before row 0: u[7 + i] is row i, i from -7 on; u[7..7+n) must hold the rows. The value before the first of a lane is the
/// last of the lane that holds the dims before (kStep lanes back), or in the other half or byte of the same word.
template <Side kSide, int n>
__device__ __forceinline__ void fill_halo(uint32_t (&u)[n + 7], int lane) {
#pragma unroll
    for (int i = -1; i >= -7; --i) {
        const uint32_t own = u[7 + i + n];
        if constexpr (kSide == Side::key) {
            const uint32_t before = __shfl_sync(~0u, own, (lane & ~3) | ((lane + 3) & 3));
            u[7 + i] = select(own << 4, before >> 12, 0xFFF0FFF0u);
        } else {
            u[7 + i] = prmt(__shfl_sync(~0u, own, (lane + 28) & 31), own, 0x5432);
        }
    }
}

}  // namespace turboquant::cuda
