// The codes of a tile as bytes: planes <-> panel, slots of a panel, bits of a row (codec/tile.h).
#pragma once

namespace turboquant {
namespace {

// The codes of a unit, a byte each, in the order of the panel. `low`: bits in the first plane (0: there are 1-bit planes only).
template <int low, int bits>
inline void unpack_unit_codes(const uint8_t* codes, uint8_t* out) {
    const auto store = [&](int at, Simd::B v) {
        for (int b = low; b < bits; ++b) v = Simd::or_if_bits(codes + 32 * b + at / 8, v, static_cast<uint8_t>(1 << b));
        Simd::store_bytes(out + at, v);
    };
    if constexpr (low == 8) {
        memcpy(out, codes, 256);
    } else if constexpr (low == 0) {
        for (int at = 0; at < 256; at += Simd::kBytes) store(at, Simd::splat_bytes(0));
    } else if constexpr (low == 2) {
        for (int o = 0; o < 64; o += Simd::kBytes)
            for_each_2bit_run(Simd::load_bytes(codes + o), [&](int r, Simd::B v) { store(64 * r + o, Simd::and_bytes(v, 3)); });
    } else {
        for (int h = 0; h < 128; h += 64)
            for (int o = 0; o < 64; o += Simd::kBytes) {
                const Simd::B v = Simd::load_bytes(codes + h + o);
                store(2 * h + o, Simd::and_bytes(v, 15));
                store(2 * h + 64 + o, Simd::and_bytes(Simd::shift_right<4>(v), 15));
            }
    }
}

// The way back: a panel's codes to planes.
template <int low, int bits>
inline void pack_unit_codes(const uint8_t* in, uint8_t* codes) {
    if constexpr (low == 8) {
        memcpy(codes, in, 256);
    } else if constexpr (low == 4) {
        for (int h = 0; h < 2; ++h)
            for (int o = 0; o < 64; ++o) codes[64 * h + o] = static_cast<uint8_t>((in[128 * h + o] & 15) | in[128 * h + 64 + o] << 4);
    } else if constexpr (low == 2) {
        for (int o = 0; o < 64; ++o)
            codes[o] = static_cast<uint8_t>((in[o] & 3) | (in[64 + o] & 3) << 2 | (in[128 + o] & 3) << 4 | in[192 + o] << 6);
    }
    for (int b = low; b < bits; ++b)
        for (int at = 0; at < 256; at += Simd::kBytes)
            Simd::store_less(codes + 32 * b + at / 8, Simd::splat_bytes(0),
                             Simd::and_bytes(Simd::load_bytes(in + at), static_cast<uint8_t>(1 << b)));
}

// f.operator()<low, bits>() for how a format's planes are cut; false for formats that have planes of another cut (turbo5, turbo6) or none.
template <class F>
inline bool for_planes(const CodecTables& t, F&& f) {
    if (t.trellis) switch (t.bits) {
            case 1:
                return f.template operator()<0, 1>(), true;
            case 2:
                return f.template operator()<0, 2>(), true;
            case 3:
                return f.template operator()<2, 3>(), true;
            case 4:
                return f.template operator()<2, 4>(), true;
            case 5:
                return f.template operator()<2, 5>(), true;
        }
    if (t.rotated) switch (t.bits) {
            case 2:
                return f.template operator()<2, 2>(), true;
            case 3:
                return f.template operator()<2, 3>(), true;
            case 4:
                return f.template operator()<4, 4>(), true;
            case 8:
                return f.template operator()<8, 8>(), true;
        }
    return false;
}

inline void unpack_codes(const CodecTables& t, const uint8_t* codes, uint8_t* out) {
    const int n = t.head_dim / 4;
    if (for_planes(t, [&]<int low, int bits>() {
            for (int u = 0; u < n; ++u) unpack_unit_codes<low, bits>(codes + 32 * bits * u, out + 256 * u);
        }))
        return;
    for (int u = 0; u < n; ++u)
        t.bits == 5 ? unpack_unit_indices<5>(codes + 160 * u, out + 256 * u) : unpack_unit_indices<6>(codes + 192 * u, out + 256 * u);
}

inline bool packs_panels(const CodecTables& t) {
    return for_planes(t, []<int, int>() {});
}
inline void pack_panel(const CodecTables& t, const uint8_t* panel, uint8_t* codes) {
    for_planes(t, [&]<int low, int bits>() {
        for (int u = 0; u < t.head_dim / 4; ++u) pack_unit_codes<low, bits>(panel + 256 * u, codes + 32 * bits * u);
    });
}

// Where the bytes of one slot lie in a panel of bytes: copy(at, dim, n) for n bytes that lie together, of dims dim .. dim+n-1.
template <class Copy>
inline void for_slot(const CodecTables& t, Side side, int slot, Copy&& copy) {
    const int d = t.head_dim;
    if (t.i8 && side == Side::key) {
        for (int g = 0; g < d / 4; ++g) copy(4 * (g * kTileKeys + slot), 4 * g, 4);
    } else if (t.i8) {
        const int first = slot / 4 * d * 4 + slot % 4;
        for (int i = 0; i < d; ++i) copy(first + 4 * i, i, 1);
    } else if (side == Side::key) {
        for (int i = 0; i < d; ++i) copy(i * kTileKeys + slot, i, 1);
    } else {
        copy(slot * d, 0, d);
    }
}
inline void pick_slot(const CodecTables& t, Side side, const uint8_t* panel, int slot, uint8_t* out) {
    for_slot(t, side, slot, [&](int at, int dim, int n) { memcpy(out + dim, panel + at, n); });
}
inline void put_slot(const CodecTables& t, Side side, const uint8_t* in, int slot, uint8_t* panel) {
    for_slot(t, side, slot, [&](int at, int dim, int n) { memcpy(panel + at, in + dim, n); });
}

// Four slots of values with int8 levels, of which `first` (a multiple of 4) is the lowest: each dim's four bytes lie together in a panel.
inline void put_four_slots(const CodecTables& t, const uint8_t* const* in, int first, uint8_t* panel) {
    uint8_t* out = panel + first * t.head_dim;
    int i = 0;
    for (; i + Simd::kBytes <= t.head_dim; i += Simd::kBytes) {
        Simd::B even[2], odd[2];
        Simd::interleave(Simd::load_bytes(in[0] + i), Simd::load_bytes(in[2] + i), even, even + 1);
        Simd::interleave(Simd::load_bytes(in[1] + i), Simd::load_bytes(in[3] + i), odd, odd + 1);
        for (int h = 0; h < 2; ++h) {
            Simd::B low, high;
            Simd::interleave(even[h], odd[h], &low, &high);
            Simd::store_bytes(out + 4 * i + 2 * h * Simd::kBytes, low);
            Simd::store_bytes(out + 4 * i + (2 * h + 1) * Simd::kBytes, high);
        }
    }
    for (; i < t.head_dim; ++i)
        for (int k = 0; k < 4; ++k) out[4 * i + k] = in[k][i];
}

// 8 codes, a byte each, to 8*bits bits, lowest first; and back.
template <int bits>
inline uint64_t pack8(uint64_t x) {
    constexpr int s = 8 - bits;
    constexpr uint64_t code = (1u << bits) - 1, pair = (uint64_t{1} << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
    x = (x & code * 0x0001000100010001u) | (x & code * 0x0100010001000100u) >> s;
    x = (x & pair * 0x0000000100000001u) | (x & pair * 0x0001000000010000u) >> 2 * s;
    return (x & four) | (x & four << 32) >> 4 * s;
}
template <int bits>
inline uint64_t unpack8(uint64_t x) {
    constexpr int s = 8 - bits;
    constexpr uint64_t code = (1u << bits) - 1, pair = (uint64_t{1} << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
    x = (x & four) | (x & four << 4 * bits) << 4 * s;
    x = (x & pair * 0x0000000100000001u) | (x & (pair << 2 * bits) * 0x0000000100000001u) << 2 * s;
    return (x & code * 0x0001000100010001u) | (x & (code << bits) * 0x0001000100010001u) << s;
}

// The n bytes at p as a number, lowest first. By whole loads: bytes copied into a word would wait in the store buffer for the word to be read.
template <int n>
inline uint64_t load_low(const uint8_t* p) {
    constexpr int whole = n >= 4 ? 4 : n >= 2 ? 2 : 1;
    uint64_t x = 0;
    if constexpr (n == 8) {
        memcpy(&x, p, 8);
    } else {
        if constexpr (whole == 4) {
            uint32_t low;
            memcpy(&low, p, 4);
            x = low;
        } else if constexpr (whole == 2) {
            uint16_t low;
            memcpy(&low, p, 2);
            x = low;
        } else {
            x = *p;
        }
        if constexpr (n > whole) x |= load_low<n - whole>(p + whole) << 8 * whole;
    }
    return x;
}

template <int bits>
inline void pack_codes(const uint8_t* codes, int n, uint8_t* row) {
    for (int i = 0; i < n; i += 8, codes += 8, row += bits) {
        uint64_t x;
        memcpy(&x, codes, 8);
        x = pack8<bits>(x);
        memcpy(row, &x, bits);
    }
}
template <int bits>
inline void unpack_row(const uint8_t* row, int n, uint8_t* codes) {
    for (int i = 0; i < n; i += 8, codes += 8, row += bits) {
        const uint64_t x = unpack8<bits>(load_low<bits>(row));
        memcpy(codes, &x, 8);
    }
}

// f.operator()<bits>() for the bits of a rotated codec.
template <class F>
inline void for_bits(int bits, F&& f) {
    switch (bits) {
        case 1:
            return f.template operator()<1>();
        case 2:
            return f.template operator()<2>();
        case 3:
            return f.template operator()<3>();
        case 4:
            return f.template operator()<4>();
        case 5:
            return f.template operator()<5>();
        case 6:
            return f.template operator()<6>();
        case 8:
            return f.template operator()<8>();
    }
}

// The halves of a slot of a raw tile, and back: copy(at, dim, n) as in for_slot, in halves.
template <class Copy>
inline void for_halves(const CodecTables& t, Side side, int slot, Copy&& copy) {
    if (side == Side::value)
        copy(slot * t.head_dim, 0, t.head_dim);
    else
        for (int d = 0; d < t.head_dim; ++d) copy(d * kTileKeys + slot, d, 1);
}
inline void pick_halves(const CodecTables& t, Side side, const uint8_t* tile, int slot, uint8_t* row) {
    for_halves(t, side, slot, [&](int at, int dim, int n) { memcpy(row + 2 * dim, tile + 2 * at, 2 * static_cast<size_t>(n)); });
}
inline void put_halves(const CodecTables& t, Side side, const uint8_t* row, int slot, uint8_t* tile) {
    for_halves(t, side, slot, [&](int at, int dim, int n) { memcpy(tile + 2 * at, row + 2 * dim, 2 * static_cast<size_t>(n)); });
}

}  // namespace
}  // namespace turboquant
