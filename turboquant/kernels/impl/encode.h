// Vectors -> tile slots: codec/quantizer.h's Algorithm 1 on registers.
#pragma once

namespace turboquant {
namespace {

constexpr int kMaxDim = kMaxHeadDim;

// Level on |t|: number of positive boundaries <= |t|, with the level's value.
template <int half>
inline void quantize_by_compares(const CodecTables& t, Simd::F magnitude, Simd::F* level, Simd::F* value) {
    *level = Simd::splat(0);
    *value = Simd::splat(t.levels[0]);
    for (int k = 0; k + 1 < half; ++k) {
        const Simd::M m = Simd::greater_equal(magnitude, Simd::splat(t.bounds[k]));
        *level = Simd::add_if(m, *level, Simd::splat(1));
        *value = Simd::select(m, *value, Simd::splat(t.levels[k + 1]));
    }
}

// The same from the table of cells, which leaves one comparison: for fine codebooks.
inline void quantize_by_cells(const CodecTables& t, Simd::F magnitude, Simd::F* level, Simd::F* value) {
    float m[Simd::kFloats], l[Simd::kFloats], v[Simd::kFloats];
    Simd::store(m, magnitude);
    for (int i = 0; i < Simd::kFloats; ++i) {
        const float x = m[i] * t.bins_per_unit;
        int k = t.bins[x < kEncodeBins - 1 ? static_cast<int>(x) : kEncodeBins - 1];
        k += m[i] >= t.bounds[k];
        l[i] = static_cast<float>(k);
        v[i] = t.levels[k];
    }
    *level = Simd::load(l);
    *value = Simd::load(v);
}

// Codes of y[i]*inverse (a rotated unit vector); cc and yc: <c,c> and <y,c>.
template <int half>
inline void quantize(const CodecTables& t, const float* y, uint8_t* codes, float* cc, float* yc) {
    Simd::F sum_cc = Simd::splat(0), sum_yc = Simd::splat(0);
    const Simd::F zero = Simd::splat(0), base = Simd::splat(static_cast<float>(t.half)),
                  below = Simd::splat(static_cast<float>(t.half - 1));
    for (int i = 0; i < t.head_dim; i += Simd::kFloats) {
        const Simd::F x = Simd::load(y + i), magnitude = Simd::abs(x);
        Simd::F level, value;
        if constexpr (half <= 16)
            quantize_by_compares<half>(t, magnitude, &level, &value);
        else
            quantize_by_cells(t, magnitude, &level, &value);
        sum_cc = Simd::fma(value, value, sum_cc);
        sum_yc = Simd::fma(value, magnitude, sum_yc);  // level and value have the same sign
        Simd::store_as_bytes(codes + i, Simd::select(Simd::greater_equal(x, zero), Simd::sub(below, level), Simd::add(base, level)));
    }
    *cc = Simd::reduce_add(sum_cc);
    *yc = Simd::reduce_add(sum_yc);
}

inline void quantize(const CodecTables& t, const float* y, uint8_t* codes, float* cc, float* yc) {
    switch (t.bits) {
        case 2:
            return quantize<2>(t, y, codes, cc, yc);
        case 3:
            return quantize<4>(t, y, codes, cc, yc);
        case 4:
            return quantize<8>(t, y, codes, cc, yc);
        case 5:
            return quantize<16>(t, y, codes, cc, yc);
        default:
            return quantize<32>(t, y, codes, cc, yc);
    }
}

inline float sum_of_squares(const float* x, int n) {
    Simd::F sum = Simd::splat(0);
    for (int i = 0; i < n; i += Simd::kFloats) sum = Simd::fma(Simd::load(x + i), Simd::load(x + i), sum);
    return Simd::reduce_add(sum);
}

inline bool all_finite(const float* x, int n) {
    for (int i = 0; i < n; ++i)
        if (!(__builtin_fabsf(x[i]) <= 3.4028234e38f)) return false;
    return true;
}

// A vector, rotated and of norm 1 (or 0), with what is needed for its scale.
struct UnitVector {
    float norm, unit;  // the norm is norm/unit
    bool good;         // all values are finite; else it is taken for zero
};

inline UnitVector normalize(const CodecTables& t, const float* x, float* y) {
    UnitVector v{0, 1, true};
    float square = sum_of_squares(x, t.head_dim);
    if (!(square > 1e-25f && square < 1e30f)) {  // rare: zero, not finite, or squares beyond the range of float
        v.good = all_finite(x, t.head_dim);
        v.unit = square > 1 ? 0x1p-100f : 0x1p100f;
        for (int i = 0; i < t.head_dim; ++i) y[i] = v.good ? x[i] * v.unit : 0;
        square = sum_of_squares(y, t.head_dim);
        x = y;
    }
    v.norm = __builtin_sqrtf(square);
    rotate(t, x, y, square > 0 ? 1 / v.norm : 0, false);
    return v;
}

inline uint16_t stored_scale(const UnitVector& v, NormMode mode, float cc, float yc) {
    const float factor = mode == NormMode::plain ? 1 : mode == NormMode::corrected ? 1 / __builtin_sqrtf(cc) : 1 / yc;
    return to_half(v.norm > 0 ? v.norm * factor / v.unit : 0);  // the largest half if it is infinite
}

template <class Word>
inline void put(uint8_t* p, Word mask, Word value) {
    Word w;
    memcpy(&w, p, sizeof w);
    w = static_cast<Word>((w & ~mask) | value);
    memcpy(p, &w, sizeof w);
}

// Keys, int8 panel: 4 dims of one slot are 4 adjacent bytes of a plane; unit = dim/4. `low`: bits in the first plane (0: there is none).
template <int low>
inline void store_key_i8(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    const int quarter = slot / 16, l = slot % 16 * 4, shift = low == 4 ? quarter % 2 * 4 : 2 * quarter;
    const uint32_t mask = ((1u << low) - 1) * 0x01010101u;
    for (int u = 0; u < t.head_dim / 4; ++u) {
        uint32_t c;
        memcpy(&c, codes + 4 * u, 4);
        uint8_t* unit = tile + 32 * t.bits * u;
        if constexpr (low > 0) put<uint32_t>(unit + (low == 4 ? quarter / 2 * 64 : 0) + l, mask << shift, (c & mask) << shift);
        for (int b = low; b < t.bits; ++b) {
            const uint32_t bit = ((c >> b & 0x01010101u) * 0x01020408u) >> 24 & 15u;  // bit b of each code, gathered
            put<uint8_t>(unit + 32 * b + slot / 2, static_cast<uint8_t>(15 << slot % 2 * 4), static_cast<uint8_t>(bit << slot % 2 * 4));
        }
    }
}

// Bit b of 8 codes, at bits 0, 4, .. 28.
inline uint64_t every_fourth(const uint8_t* codes, int b) {
    uint64_t x;
    memcpy(&x, codes, 8);
    x = x >> b & 0x0101010101010101u;
    x = (x | x >> 4) & 0x0011001100110011u;
    x = (x | x >> 8) & 0x0000111100001111u;
    return (x | x >> 16) & 0x11111111u;
}

// Values, int8 panel: 16 dims of one slot are one byte each of 16 adjacent dwords. `low`: bits in the first plane (0: there is none).
template <int low>
inline void store_value_i8(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    const int byte = slot % 4;
    for (int d = 0; d < t.head_dim; d += 16) {
        const int lane = slot / 4 * t.head_dim + d, quarter = lane % 64 / 16;
        uint8_t* unit = tile + static_cast<size_t>(32) * t.bits * (lane / 64);
        if constexpr (low > 0) {
            const int shift = 8 * byte + (low == 4 ? quarter % 2 * 4 : 2 * quarter);
            const uint32_t mask = (1 << low) - 1;
            uint8_t* plane = unit + (low == 4 ? quarter / 2 * 64 : 0);
            uint32_t words[16];
            memcpy(words, plane, 64);
            for (int i = 0; i < 16; ++i) words[i] = (words[i] & ~(mask << shift)) | (codes[d + i] & mask) << shift;
            memcpy(plane, words, 64);
        }
        for (int b = low; b < t.bits; ++b)  // 1-bit planes: bits 4i + byte of 64
            put<uint64_t>(unit + 32 * b + quarter * 8, 0x1111111111111111u << byte,
                          (every_fourth(codes + d, b) | every_fourth(codes + d + 8, b) << 32) << byte);
    }
}

template <int low>
inline void store_i8_planes(const CodecTables& t, Side side, uint8_t* tile, int slot, const uint8_t* codes) {
    if (side == Side::key)
        store_key_i8<low>(t, tile, slot, codes);
    else
        store_value_i8<low>(t, tile, slot, codes);
}

inline void store_i8(const CodecTables& t, Side side, uint8_t* tile, int slot, const uint8_t* codes) {
    if (t.bits == 4 && !t.trellis) return store_i8_planes<4>(t, side, tile, slot, codes);
    if (t.bits > 2 || !t.trellis) return store_i8_planes<2>(t, side, tile, slot, codes);
    store_i8_planes<0>(t, side, tile, slot, codes);
}

// Keys, float panel: unit = dim/4, and slot's byte of each plane holds whole codes of those 4 dims (but for the 1-bit plane).
template <int bits>
inline void store_key_f32(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    for (int d = 0; d < t.head_dim; d += 4, codes += 4, tile += 32 * bits) {
        if constexpr (bits == 8) {
            for (int i = 0; i < 4; ++i) tile[64 * i + slot] = codes[i];
            continue;
        }
        for (int h = 0; h < 2; ++h) tile[64 * h + slot] = static_cast<uint8_t>((codes[2 * h] & 15) | codes[2 * h + 1] << 4);
        if constexpr (bits == 6)
            tile[128 + slot] = static_cast<uint8_t>(codes[0] >> 4 | codes[1] >> 4 << 2 | codes[2] >> 4 << 4 | codes[3] >> 4 << 6);
        if constexpr (bits == 5)
            for (int i = 0; i < 4; ++i)
                put<uint8_t>(tile + 128 + 8 * i + slot / 8, static_cast<uint8_t>(1 << slot % 8),
                             static_cast<uint8_t>((codes[i] >> 4) << slot % 8));
    }
}

// Values, float panel: 16 dims of one slot are 16 adjacent codes of a unit.
template <int bits>
inline void store_value_f32(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    for (int d = 0; d < t.head_dim; d += 16, codes += 16) {
        const int index = slot * t.head_dim + d, r = index % 256, quarter = r / 64;
        uint8_t* unit = tile + static_cast<size_t>(32) * bits * (index / 256);
        if constexpr (bits == 8) {
            memcpy(unit + r, codes, 16);
            continue;
        }
        const auto put_plane = [&](uint8_t* plane, int from, int mask, int shift) {
            uint8_t bytes[16];
            memcpy(bytes, plane, 16);
            for (int i = 0; i < 16; ++i)
                bytes[i] = static_cast<uint8_t>((bytes[i] & ~(mask << shift)) | (codes[i] >> from & mask) << shift);
            memcpy(plane, bytes, 16);
        };
        put_plane(unit + quarter / 2 * 64 + r % 64, 0, 15, quarter % 2 * 4);
        if constexpr (bits == 6) put_plane(unit + 128 + r % 64, 4, 3, 2 * quarter);
        if constexpr (bits == 5) {
            uint32_t high = 0;
            for (int i = 0; i < 16; ++i) high |= static_cast<uint32_t>(codes[i] >> 4) << i;
            put<uint16_t>(unit + 128 + r / 8, 0xffff, static_cast<uint16_t>(high));
        }
    }
}

template <int bits>
inline void store_f32_bits(const CodecTables& t, Side side, uint8_t* tile, int slot, const uint8_t* codes) {
    if (side == Side::key)
        store_key_f32<bits>(t, tile, slot, codes);
    else
        store_value_f32<bits>(t, tile, slot, codes);
}

inline void store_f32(const CodecTables& t, Side side, uint8_t* tile, int slot, const uint8_t* codes) {
    switch (t.bits) {
        case 5:
            return store_f32_bits<5>(t, side, tile, slot, codes);
        case 6:
            return store_f32_bits<6>(t, side, tile, slot, codes);
        case 8:
            return store_f32_bits<8>(t, side, tile, slot, codes);
    }
}

inline void to_halves(const float* x, size_t n, uint16_t* out) {
    for (size_t i = 0; i < n; i += Simd::kFloats)
        Simd::store_halves(out + i, Simd::max(Simd::min(Simd::load(x + i), Simd::splat(65504)), Simd::splat(-65504)));
}

inline bool store_raw(const CodecTables& t, Side side, uint8_t* tile, int slot, const float* x) {
    uint16_t halves[kMaxDim];
    const bool good = sum_of_squares(x, t.head_dim) < 1e30f || all_finite(x, t.head_dim);
    if (good)
        to_halves(x, t.head_dim, halves);
    else
        memset(halves, 0, sizeof(halves));
    if (side == Side::value)
        memcpy(tile + 2 * static_cast<size_t>(slot) * t.head_dim, halves, 2 * t.head_dim);
    else
        for (int d = 0; d < t.head_dim; ++d) memcpy(tile + 2 * (d * kTileKeys + slot), halves + d, 2);
    return good;
}

inline void store_codes(const CodecTables& t, Side side, uint8_t* tile, int slot, const uint8_t* codes, uint16_t scale) {
    if (t.i8)
        store_i8(t, side, tile, slot, codes);
    else
        store_f32(t, side, tile, slot, codes);
    memcpy(tile + static_cast<size_t>(8) * t.bits * t.head_dim + 2 * slot, &scale, 2);
}

// Vector i of the batch, less its key offset: then it lies in y.
inline const float* source(const EncodeArgs& a, int i, float* y) {
    const float* x = a.x + static_cast<size_t>(i) * a.x_stride;
    if (i + 1 < a.n)  // heads of other vectors lie in between, which a hardware prefetcher does not see through
        for (int k = 0; k < a.shape.head_dim; k += 16) __builtin_prefetch(x + a.x_stride + k);
    if (!a.turns || !a.offsets[i]) return x;
    const int d = a.shape.head_dim;
    const float *offset = a.offsets[i] + a.offset_at, *turn = a.turns + static_cast<size_t>(i) * 2 * d;
    for (int k = 0; k < d; k += Simd::kFloats) {
        const Simd::F of_perp = Simd::mul(Simd::load(offset + d + k), Simd::load(turn + d + k));
        Simd::store(y + k, Simd::sub(Simd::load(x + k), Simd::fma(Simd::load(offset + k), Simd::load(turn + k), of_perp)));
    }
    return y;
}

// Vectors first..first+n-1 of the batch, searched in step. put(i, codes, scale) takes what is stored of vector i.
template <int n, class Put>
inline bool encode_trellis(const EncodeArgs& a, const CodecTables& t, int first, Put&& put) {
    alignas(64) float y[n][kMaxDim];
    alignas(64) uint8_t codes[n][kMaxDim];
    TrellisVector v[n];
    UnitVector unit[n];
    float cc[n], yc[n];
    bool all_good = true;
    for (int k = 0; k < n; ++k) {
        unit[k] = normalize(t, source(a, first + k, y[k]), y[k]);
        all_good &= unit[k].good;
    }
    quantize_trellis<n>(t, y, v, codes, cc, yc);
    for (int k = 0; k < n; ++k) put(first + k, codes[k], stored_scale(unit[k], a.norm_mode, cc[k], yc[k]));
    return all_good;
}

// The batch in a rotated format.
template <class Put>
inline bool encode_rotated(const EncodeArgs& a, const CodecTables& t, Put&& put) {
    bool all_good = true;
    int i = 0;
    if (t.trellis) {
        constexpr int n = Simd::kTrellisVectors;
        for (; i + n <= a.n; i += n) all_good &= encode_trellis<n>(a, t, i, put);
        for (; i < a.n; ++i) all_good &= encode_trellis<1>(a, t, i, put);
    }
    for (; i < a.n; ++i) {
        alignas(64) float y[kMaxDim];
        alignas(64) uint8_t codes[kMaxDim];
        const UnitVector unit = normalize(t, source(a, i, y), y);
        float cc, yc;
        quantize(t, y, codes, &cc, &yc);
        all_good &= unit.good;
        put(i, codes, stored_scale(unit, a.norm_mode, cc, yc));
    }
    return all_good;
}

inline bool encode(const EncodeArgs& a, const CodecTables& t) {
    const auto tile_of = [&](int i) { return a.tiles + a.cells[i] / kTileKeys * a.tile_stride; };
    const auto slot_of = [&](int i) { return static_cast<int>(a.cells[i] % kTileKeys); };
    if (t.rotated)
        return encode_rotated(
            a, t, [&](int i, const uint8_t* codes, uint16_t scale) { store_codes(t, a.shape.side, tile_of(i), slot_of(i), codes, scale); });
    bool all_good = true;
    for (int i = 0; i < a.n; ++i) {
        alignas(64) float y[kMaxDim];
        all_good &= store_raw(t, a.shape.side, tile_of(i), slot_of(i), source(a, i, y));
    }
    return all_good;
}

}  // namespace
}  // namespace turboquant
