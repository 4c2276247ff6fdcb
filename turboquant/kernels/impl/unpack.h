// Tile codes -> panels (codec/tile.h): a unit of 256 codes is read as four runs of 64, in the order of the planes.
#pragma once

namespace turboquant {
namespace {

// Four runs of codes in 2-bit planes: run r is plane >> 2r.
template <class Store>
inline void for_each_2bit_run(Simd::B plane, Store store) {
    store(0, plane);
    store(1, Simd::shift_right<2>(plane));
    store(2, Simd::shift_right<4>(plane));
    store(3, Simd::shift_right<6>(plane));
}

// The int8 table of a codec, ready for look-ups, in parts of up to 16 entries: turbo3's two are told apart by its third bit, a trellis
// codec's two by z1, tcq5's four by z0 and z1. Parts are repeated to fill 16 entries, so that only the bits below are read.
struct Lut {
    Simd::B part[4];
};

inline Lut load_lut(const CodecTables& t, int bias) {
    const int8_t* table = t.trellis ? t.trellis_lut : t.lut;
    const int codes = t.bits >= 4 ? 16 : t.trellis ? 1 << t.bits : 4, all = t.trellis ? 64 : 16;
    Lut lut;
    for (int p = 0; p < 4; ++p) {
        int8_t part[16];
        for (int i = 0; i < 16; ++i) part[i] = static_cast<int8_t>(table[(i % codes + p * codes) % all] + bias);
        lut.part[p] = Simd::load_lut(part);
    }
    return lut;
}

template <int bits>
inline void unpack_unit_i8(const uint8_t* codes, const Lut& lut, uint8_t* panel) {
    for (int o = 0; o < 64; o += Simd::kBytes) {
        if constexpr (bits == 4) {
            for (int h = 0; h < 128; h += 64) {
                const Simd::B v = Simd::load_bytes(codes + h + o);
                Simd::store_bytes(panel + 2 * h + o, Simd::lookup16(lut.part[0], v));
                Simd::store_bytes(panel + 2 * h + 64 + o, Simd::lookup16(lut.part[0], Simd::shift_right<4>(v)));
            }
        } else {
            for_each_2bit_run(Simd::load_bytes(codes + o), [&](int r, Simd::B v) {
                Simd::B c = Simd::lookup16(lut.part[0], v);
                if constexpr (bits == 3) c = Simd::select_bits(codes + 64 + 8 * r + o / 8, c, Simd::lookup16(lut.part[1], v));
                Simd::store_bytes(panel + 64 * r + o, c);
            });
        }
    }
}

inline void unpack_trellis(const CodecTables& t, Side side, const uint8_t* codes, const Lut& lut, uint8_t* panel);

// Int8 panel of a tile; bias is added to every byte.
inline void unpack_i8(const CodecTables& t, Side side, const uint8_t* codes, const Lut& table, uint8_t* panel) {
    if (t.trellis) return unpack_trellis(t, side, codes, table, panel);
    const Lut lut = table;  // in registers: the panel's bytes may alias anything
    const int n_units = t.head_dim / 4;
    switch (t.bits) {
        case 2:
            for (int u = 0; u < n_units; ++u) unpack_unit_i8<2>(codes + 64 * u, lut, panel + 256 * u);
            break;
        case 3:
            for (int u = 0; u < n_units; ++u) unpack_unit_i8<3>(codes + 96 * u, lut, panel + 256 * u);
            break;
        case 4:
            for (int u = 0; u < n_units; ++u) unpack_unit_i8<4>(codes + 128 * u, lut, panel + 256 * u);
            break;
    }
}

// 64*bits bytes -> 256 indices, one byte each.
template <int bits>
inline void unpack_unit_indices(const uint8_t* codes, uint8_t* index) {
    const Simd::B zero = Simd::splat_bytes(0), bit4 = Simd::splat_bytes(16);
    for (int o = 0; o < 64; o += Simd::kBytes)
        for (int h = 0; h < 2; ++h) {
            const Simd::B v = Simd::load_bytes(codes + 64 * h + o);
            Simd::B run[2] = {Simd::and_bytes(v, 15), Simd::and_bytes(Simd::shift_right<4>(v), 15)};
            for (int r = 0; r < 2; ++r) {
                if constexpr (bits == 5)
                    run[r] = Simd::or_bytes(run[r], Simd::select_bits(codes + 128 + 8 * (2 * h + r) + o / 8, zero, bit4));
                Simd::store_bytes(index + 128 * h + 64 * r + o, run[r]);
            }
        }
    if constexpr (bits == 6)
        for (int o = 0; o < 64; o += Simd::kBytes)
            for_each_2bit_run(Simd::load_bytes(codes + 128 + o), [&](int r, Simd::B v) {
                uint8_t* to = index + 64 * r + o;
                // Two bits to places 4 and 5: v & 3, times 16, without a left shift: (v & 3) is looked up.
                alignas(16) static constexpr int8_t times16[16] = {0, 16, 32, 48, 0, 16, 32, 48, 0, 16, 32, 48, 0, 16, 32, 48};
                Simd::store_bytes(to, Simd::or_bytes(Simd::load_bytes(to), Simd::lookup16(Simd::load_lut(times16), v)));
            });
}

template <int bits>
inline void unpack_f32_bits(const CodecTables& t, const uint8_t* codes, float* panel) {
    const int n_units = t.head_dim / 4;
    for (int u = 0; u < n_units; ++u, codes += 32 * bits) {
        alignas(64) uint8_t buffer[256];
        const uint8_t* index = codes;
        if constexpr (bits < 8) {
            unpack_unit_indices<bits>(codes, buffer);
            index = buffer;
        }
        for (int i = 0; i < 256; i += Simd::kFloats) Simd::store(panel + 256 * u + i, Simd::lookup_floats<bits>(t.centroids, index + i));
    }
}

// Float panel of a tile.
inline void unpack_f32(const CodecTables& t, const uint8_t* codes, float* panel) {
    switch (t.bits) {
        case 5:
            return unpack_f32_bits<5>(t, codes, panel);
        case 6:
            return unpack_f32_bits<6>(t, codes, panel);
        case 8:
            return unpack_f32_bits<8>(t, codes, panel);
    }
    for (int i = 0; i < t.head_dim * kTileKeys; i += Simd::kFloats) {
        uint16_t halves[Simd::kFloats];
        memcpy(halves, codes + 2 * i, sizeof halves);
        Simd::store(panel + i, Simd::load_halves(halves));
    }
}

// The 64 scales after the codes, times `factor`; 1 for raw.
inline void unpack_scales(const CodecTables& t, const uint8_t* tile, float* scales) {
    const uint8_t* p = tile + kTileKeys * t.head_dim * t.bits / 8;
    for (int i = 0; i < kTileKeys; i += Simd::kFloats) {
        uint16_t halves[Simd::kFloats];
        if (t.rotated) memcpy(halves, p + 2 * i, sizeof halves);
        const Simd::F s = t.rotated ? Simd::load_halves(halves) : Simd::splat(1);
        Simd::store(scales + i, t.i8 ? Simd::mul(s, Simd::splat(t.lut_step)) : s);
    }
}

// Key panel -> value panel of the same tile (MLA: values are keys). Plain: shared by all query heads.
inline void transpose_i8(const uint8_t* keys, int head_dim, uint8_t* values) {
    for (int g = 0; g < head_dim / 4; ++g)
        for (int s = 0; s < kTileKeys; ++s)
            for (int b = 0; b < 4; ++b)
                values[(static_cast<size_t>(s / 4) * head_dim + 4 * g + b) * 4 + s % 4] =
                    static_cast<uint8_t>(keys[(static_cast<size_t>(g) * kTileKeys + s) * 4 + b] - Simd::kPanelBias);
}

inline void transpose_f32(const float* keys, int head_dim, float* values) {
    for (int d = 0; d < head_dim; ++d)
        for (int s = 0; s < kTileKeys; ++s) values[static_cast<size_t>(s) * head_dim + d] = keys[static_cast<size_t>(d) * kTileKeys + s];
}

}  // namespace
}  // namespace turboquant
