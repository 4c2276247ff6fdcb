// Vectors -> tile slots: codec/quantizer.h's Algorithm 1 on registers.
#pragma once

namespace turboquant {
namespace {

constexpr int kMaxDim = 576;

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
        const float x = m[i] * t.cells_per_unit;
        int k = t.cells[x < kEncodeCells - 1 ? static_cast<int>(x) : kEncodeCells - 1];
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

// Codes and scale of x; false (and zeros) if a value is not finite.
inline bool quantize_vector(const CodecTables& t, NormMode mode, const float* x, uint8_t* codes, float* scale) {
    alignas(64) float y[kMaxDim];
    float square = sum_of_squares(x, t.head_dim), unit = 1;
    bool good = true;
    if (!(square > 1e-25f && square < 1e30f)) {  // rare: zero, not finite, or squares beyond the range of float
        good = all_finite(x, t.head_dim);
        unit = square > 1 ? 0x1p-100f : 0x1p100f;
        for (int i = 0; i < t.head_dim; ++i) y[i] = good ? x[i] * unit : 0;
        square = sum_of_squares(y, t.head_dim);
        x = y;
    }
    const float norm = __builtin_sqrtf(square);
    rotate(t, x, y, square > 0 ? 1 / norm : 0, false);
    float cc, yc;
    quantize(t, y, codes, &cc, &yc);
    const float factor = mode == NormMode::raw ? 1 : mode == NormMode::corrected ? 1 / __builtin_sqrtf(cc) : 1 / yc;
    *scale = square > 0 ? norm * factor / unit : 0;  // may be infinite: stored as the largest half
    return good;
}

template <class Word>
inline void put(uint8_t* p, Word mask, Word value) {
    Word w;
    memcpy(&w, p, sizeof w);
    w = static_cast<Word>((w & ~mask) | value);
    memcpy(p, &w, sizeof w);
}

// Keys, int8 panel: 4 dims of one slot are 4 adjacent bytes of a plane; unit = dim/4.
inline void store_key_i8(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    const int quarter = slot / 16, l = slot % 16 * 4;
    for (int u = 0; u < t.head_dim / 4; ++u) {
        uint32_t c;
        memcpy(&c, codes + 4 * u, 4);
        uint8_t* unit = tile + 32 * t.bits * u;
        if (t.bits == 4) {
            const int shift = quarter % 2 * 4;
            put<uint32_t>(unit + quarter / 2 * 64 + l, 0x0f0f0f0fu << shift, c << shift);
            continue;
        }
        put<uint32_t>(unit + l, 0x03030303u << (2 * quarter), (c & 0x03030303u) << (2 * quarter));
        if (t.bits == 3) {
            const uint32_t high = ((c >> 2 & 0x01010101u) * 0x01020408u) >> 24 & 15u;  // bit 2 of each code, gathered
            put<uint8_t>(unit + 64 + slot / 2, static_cast<uint8_t>(15 << slot % 2 * 4), static_cast<uint8_t>(high << slot % 2 * 4));
        }
    }
}

// Values, int8 panel: 16 dims of one slot are one byte each of 16 adjacent dwords.
inline void store_value_i8(const CodecTables& t, uint8_t* tile, int slot, const uint8_t* codes) {
    const int byte = slot % 4;
    for (int d = 0; d < t.head_dim; d += 16) {
        const int lane = slot / 4 * t.head_dim + d, quarter = lane % 64 / 16;
        uint8_t* unit = tile + static_cast<size_t>(32) * t.bits * (lane / 64);
        const int shift = 8 * byte + (t.bits == 4 ? quarter % 2 * 4 : 2 * quarter);
        const uint32_t low = t.bits == 4 ? 15 : 3;
        uint8_t* plane = unit + (t.bits == 4 ? quarter / 2 * 64 : 0);
        uint32_t words[16];
        memcpy(words, plane, 64);
        for (int i = 0; i < 16; ++i) words[i] = (words[i] & ~(low << shift)) | (codes[d + i] & low) << shift;
        memcpy(plane, words, 64);
        if (t.bits == 3) {  // bits 4i + byte of 64
            uint64_t high = 0;
            for (int i = 0; i < 16; ++i) high |= static_cast<uint64_t>(codes[d + i] >> 2) << 4 * i;
            put<uint64_t>(unit + 64 + quarter * 8, 0x1111111111111111u << byte, high << byte);
        }
    }
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

inline bool store_raw(const CodecTables& t, Side side, uint8_t* tile, int slot, const float* x) {
    uint16_t halves[kMaxDim];
    const bool good = sum_of_squares(x, t.head_dim) < 1e30f || all_finite(x, t.head_dim);
    for (int i = 0; i < t.head_dim; i += Simd::kFloats) {
        const Simd::F v = good ? Simd::load(x + i) : Simd::splat(0);
        Simd::store_halves(halves + i, Simd::max(Simd::min(v, Simd::splat(65504)), Simd::splat(-65504)));
    }
    if (side == Side::value)
        memcpy(tile + 2 * static_cast<size_t>(slot) * t.head_dim, halves, 2 * t.head_dim);
    else
        for (int d = 0; d < t.head_dim; ++d) memcpy(tile + 2 * (d * kTileKeys + slot), halves + d, 2);
    return good;
}

inline bool encode(const EncodeArgs& a, const CodecTables& t) {
    bool all_good = true;
    for (int i = 0; i < a.n; ++i) {
        uint8_t* tile = a.tiles + a.cells[i] / kTileKeys * a.tile_stride;
        const int slot = static_cast<int>(a.cells[i] % kTileKeys);
        const float* x = a.x + static_cast<size_t>(i) * a.x_stride;
        if (!t.rotated) {
            all_good &= store_raw(t, a.shape.side, tile, slot, x);
            continue;
        }
        alignas(64) uint8_t codes[kMaxDim];
        float scale;
        all_good &= quantize_vector(t, a.norm_mode, x, codes, &scale);
        if (!t.i8)
            store_f32(t, a.shape.side, tile, slot, codes);
        else if (a.shape.side == Side::key)
            store_key_i8(t, tile, slot, codes);
        else
            store_value_i8(t, tile, slot, codes);
        const uint16_t half = to_half(scale);
        memcpy(tile + static_cast<size_t>(8) * t.bits * t.head_dim + 2 * slot, &half, 2);
    }
    return all_good;
}

}  // namespace
}  // namespace turboquant
