// Tile slots <-> row form (codec/tile.h), decoded vectors, rotated keys: a whole tile is unpacked at once, its slots are then picked out.
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
    if constexpr (low == 0) {
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

template <int low, int bits>
inline void unpack_codes(int n_units, const uint8_t* codes, uint8_t* out) {
    for (int u = 0; u < n_units; ++u) unpack_unit_codes<low, bits>(codes + 32 * bits * u, out + 256 * u);
}

inline void unpack_codes(const CodecTables& t, const uint8_t* codes, uint8_t* out) {
    const int n = t.head_dim / 4;
    if (t.trellis) switch (t.bits) {
            case 1:
                return unpack_codes<0, 1>(n, codes, out);
            case 2:
                return unpack_codes<0, 2>(n, codes, out);
            case 3:
                return unpack_codes<2, 3>(n, codes, out);
            case 4:
                return unpack_codes<2, 4>(n, codes, out);
            case 5:
                return unpack_codes<2, 5>(n, codes, out);
        }
    switch (t.bits) {
        case 2:
            return unpack_codes<2, 2>(n, codes, out);
        case 3:
            return unpack_codes<2, 3>(n, codes, out);
        case 4:
            return unpack_codes<4, 4>(n, codes, out);
        case 5:
            for (int u = 0; u < n; ++u) unpack_unit_indices<5>(codes + 160 * u, out + 256 * u);
            return;
        case 6:
            for (int u = 0; u < n; ++u) unpack_unit_indices<6>(codes + 192 * u, out + 256 * u);
            return;
        case 8:
            memcpy(out, codes, static_cast<size_t>(256) * n);
    }
}

// The way back: a panel's codes to planes.
template <int low, int bits>
inline void pack_unit_codes(const uint8_t* in, uint8_t* codes) {
    if constexpr (low == 4) {
        for (int h = 0; h < 2; ++h)
            for (int o = 0; o < 64; ++o) codes[64 * h + o] = static_cast<uint8_t>((in[128 * h + o] & 15) | in[128 * h + 64 + o] << 4);
    } else if constexpr (low == 2) {
        for (int o = 0; o < 64; ++o)
            codes[o] = static_cast<uint8_t>((in[o] & 3) | (in[64 + o] & 3) << 2 | (in[128 + o] & 3) << 4 | in[192 + o] << 6);
    }
    for (int b = low; b < bits; ++b)
        for (int at = 0; at < 256; at += 8) {
            uint64_t x;
            memcpy(&x, in + at, 8);
            // The lowest bit of each byte, gathered in the highest byte, the first byte's lowest.
            codes[32 * b + at / 8] = static_cast<uint8_t>((x >> b & 0x0101010101010101u) * 0x0102040810204080u >> 56);
        }
}

template <int low, int bits>
inline void pack_units(int n_units, const uint8_t* in, uint8_t* codes) {
    for (int u = 0; u < n_units; ++u) pack_unit_codes<low, bits>(in + 256 * u, codes + 32 * bits * u);
}

// False for formats whose planes are not cut this way (turbo5, turbo6).
inline bool packs_panels(const CodecTables& t) { return t.rotated && (t.trellis || (t.bits != 5 && t.bits != 6)); }

inline void pack_panel(const CodecTables& t, const uint8_t* panel, uint8_t* codes) {
    const int n = t.head_dim / 4;
    if (t.trellis) switch (t.bits) {
            case 1:
                return pack_units<0, 1>(n, panel, codes);
            case 2:
                return pack_units<0, 2>(n, panel, codes);
            case 3:
                return pack_units<2, 3>(n, panel, codes);
            case 4:
                return pack_units<2, 4>(n, panel, codes);
            case 5:
                return pack_units<2, 5>(n, panel, codes);
        }
    switch (t.bits) {
        case 2:
            return pack_units<2, 2>(n, panel, codes);
        case 3:
            return pack_units<2, 3>(n, panel, codes);
        case 4:
            return pack_units<4, 4>(n, panel, codes);
        case 8:
            memcpy(codes, panel, static_cast<size_t>(256) * n);
    }
}

// The bytes of one slot in a panel of bytes, in the order of its dims.
inline void pick_slot(const CodecTables& t, Side side, const uint8_t* panel, int slot, uint8_t* out) {
    const int d = t.head_dim;
    if (t.i8 && side == Side::key) {
        for (int g = 0; g < d / 4; ++g) memcpy(out + 4 * g, panel + 4 * (g * kTileKeys + slot), 4);
    } else if (t.i8) {
        const uint8_t* from = panel + static_cast<size_t>(slot / 4) * d * 4 + slot % 4;
        for (int i = 0; i < d; ++i) out[i] = from[4 * i];
    } else if (side == Side::key) {
        for (int i = 0; i < d; ++i) out[i] = panel[i * kTileKeys + slot];
    } else {
        memcpy(out, panel + static_cast<size_t>(slot) * d, d);
    }
}

inline void put_slot(const CodecTables& t, Side side, const uint8_t* in, int slot, uint8_t* panel) {
    const int d = t.head_dim;
    if (t.i8 && side == Side::key) {
        for (int g = 0; g < d / 4; ++g) memcpy(panel + 4 * (g * kTileKeys + slot), in + 4 * g, 4);
    } else if (t.i8) {
        uint8_t* to = panel + static_cast<size_t>(slot / 4) * d * 4 + slot % 4;
        for (int i = 0; i < d; ++i) to[4 * i] = in[i];
    } else if (side == Side::key) {
        for (int i = 0; i < d; ++i) panel[i * kTileKeys + slot] = in[i];
    } else {
        memcpy(panel + static_cast<size_t>(slot) * d, in, d);
    }
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

constexpr int kMaxPanel = kTileKeys * kMaxDim;

// The halves of a slot of a raw tile.
inline void pick_halves(const CodecTables& t, Side side, const uint8_t* tile, int slot, uint8_t* row) {
    if (side == Side::value)
        memcpy(row, tile + 2 * static_cast<size_t>(slot) * t.head_dim, 2 * t.head_dim);
    else
        for (int d = 0; d < t.head_dim; ++d) memcpy(row + 2 * d, tile + 2 * (d * kTileKeys + slot), 2);
}

inline size_t scales_at(const CodecTables& t) { return static_cast<size_t>(8) * t.bits * t.head_dim; }

inline void get_rows(const TileRows& a, const CodecTables& t) {
    alignas(64) uint8_t panel[kMaxPanel], codes[kMaxDim];
    if (t.rotated) unpack_codes(t, a.tile, panel);
    for (int i = 0; i < a.n; ++i) {
        const int slot = static_cast<int>(a.cells[i] % kTileKeys);
        uint8_t* row = a.rows + i * a.row_stride;
        if (!t.rotated) {
            pick_halves(t, a.shape.side, a.tile, slot, row);
            continue;
        }
        pick_slot(t, a.shape.side, panel, slot, codes);
        for_bits(t.bits, [&]<int bits>() { pack_codes<bits>(codes, t.head_dim, row); });
        memcpy(row + t.head_dim * t.bits / 8, a.tile + scales_at(t) + 2 * slot, 2);
    }
}

// Many rows of a tile: its planes are unpacked (unless all of it is replaced) and packed once, instead of bits changed slot by slot.
inline void set_panel_rows(const TileRows& a, const CodecTables& t) {
    alignas(64) uint8_t panel[kMaxPanel], codes[kMaxDim];
    if (a.n < kTileKeys) unpack_codes(t, a.tile, panel);
    for (int i = 0; i < a.n; ++i) {
        const int slot = static_cast<int>(a.cells[i] % kTileKeys);
        const uint8_t* row = a.rows + i * a.row_stride;
        for_bits(t.bits, [&]<int bits>() { unpack_row<bits>(row, t.head_dim, codes); });
        put_slot(t, a.shape.side, codes, slot, panel);
        memcpy(a.tile + scales_at(t) + 2 * slot, row + t.head_dim * t.bits / 8, 2);
    }
    pack_panel(t, panel, a.tile);
}

inline void set_rows(const TileRows& a, const CodecTables& t) {
    constexpr int kMany = 8;
    if (a.n >= kMany && packs_panels(t)) return set_panel_rows(a, t);
    alignas(64) uint8_t codes[kMaxDim];
    for (int i = 0; i < a.n; ++i) {
        const int slot = static_cast<int>(a.cells[i] % kTileKeys);
        const uint8_t* row = a.rows + i * a.row_stride;
        if (!t.rotated) {
            if (a.shape.side == Side::value)
                memcpy(a.tile + 2 * static_cast<size_t>(slot) * t.head_dim, row, 2 * t.head_dim);
            else
                for (int d = 0; d < t.head_dim; ++d) memcpy(a.tile + 2 * (d * kTileKeys + slot), row + 2 * d, 2);
            continue;
        }
        for_bits(t.bits, [&]<int bits>() { unpack_row<bits>(row, t.head_dim, codes); });
        uint16_t scale;
        memcpy(&scale, row + t.head_dim * t.bits / 8, 2);
        store_codes(t, a.shape.side, a.tile, slot, codes, scale);
    }
}

// Decodes slots of one tile into the model's space.
struct TileDecoder {
    alignas(64) uint8_t panel[kMaxPanel];
    alignas(64) float table[32];  // of up to 4 bits: the levels in the middle of 16, which Simd::lookup_floats<4> mirrors

    TileDecoder(const CodecTables& t, Side side, const uint8_t* tile) {
        if (t.trellis) {
            unpack_trellis(t, side, tile, load_lut(t, 0), panel);
        } else if (t.rotated) {
            unpack_codes(t, tile, panel);
            memset(table, 0, sizeof table);
            for (int k = 0; t.i8 && k < t.half; ++k) table[8 + k] = t.levels[k], table[7 - k] = -t.levels[k];
        }
    }

    template <int bits>
    static void look_up(const float* levels, const uint8_t* codes, int n, float* y) {
        for (int i = 0; i < n; i += Simd::kFloats) Simd::store(y + i, Simd::lookup_floats<bits>(levels, codes + i));
    }

    void decode(const CodecTables& t, Side side, const uint8_t* tile, int slot, float* x) const {
        alignas(64) uint8_t codes[2 * kMaxDim];
        if (!t.rotated) {
            pick_halves(t, side, tile, slot, codes);
            for (int i = 0; i < t.head_dim; i += Simd::kFloats) {
                uint16_t halves[Simd::kFloats];
                memcpy(halves, codes + 2 * i, sizeof halves);
                Simd::store(x + i, Simd::load_halves(halves));
            }
            return;
        }
        uint16_t half[Simd::kFloats] = {};
        memcpy(half, tile + scales_at(t) + 2 * slot, 2);
        float scale[Simd::kFloats];
        Simd::store(scale, Simd::load_halves(half));
        pick_slot(t, side, panel, slot, codes);
        if (t.trellis) {
            for (int i = 0; i < t.head_dim; ++i) x[i] = static_cast<int8_t>(codes[i]);
            scale[0] *= t.lut_step;
        } else if (t.i8) {
            for (int i = 0; i < t.head_dim; ++i) codes[i] = static_cast<uint8_t>(codes[i] + 8 - t.half);
            look_up<4>(table, codes, t.head_dim, x);
        } else if (t.bits == 5) {
            look_up<5>(t.centroids, codes, t.head_dim, x);
        } else if (t.bits == 6) {
            look_up<6>(t.centroids, codes, t.head_dim, x);
        } else {
            look_up<8>(t.centroids, codes, t.head_dim, x);
        }
        rotate(t, x, x, scale[0], true);
    }
};

inline void decode_rows(const TileDecode& a, const CodecTables& t) {
    const TileDecoder decoder(t, a.shape.side, a.tile);
    alignas(64) float y[kMaxDim];
    const int d = t.head_dim;
    for (int i = 0; i < a.n; ++i) {
        decoder.decode(t, a.shape.side, a.tile, static_cast<int>(a.cells[i] % kTileKeys), y);
        if (a.turns && a.offsets[i]) {
            const float *offset = a.offsets[i] + a.offset_at, *turn = a.turns + static_cast<size_t>(i) * 2 * d;
            for (int k = 0; k < d; ++k) y[k] += offset[k] * turn[k] + offset[d + k] * turn[d + k];
        }
        for (int k = 0; a.unscale && k < d; ++k) y[k] *= a.unscale[k];
        if (a.x) memcpy(a.x + i * a.stride, y, d * sizeof(float));
        if (a.halves) to_halves(y, d, a.halves + i * a.stride);
    }
}

// Turns the pairs of a vector: x[k] becomes x[k] cosine[k] + x[partner of k] sine[k]. Cells that move together have one table.
struct PairTurns {
    const PairTurn pairs;
    const float* table = nullptr;  // that was unpacked last
    alignas(64) float cosine[kMaxDim], sine[kMaxDim], partner[kMaxDim];

    explicit PairTurns(const PairTurn& p) : pairs(p) {}

    void turn(const float* wanted, float* x) {
        const int n = pairs.n_dims / 2, step = pairs.adjacent ? 2 : 1, apart = pairs.adjacent ? 1 : n;
        if (wanted != table) {
            for (int i = 0; i < n; ++i) {
                cosine[i * step] = cosine[i * step + apart] = wanted[2 * i];
                sine[i * step] = -wanted[2 * i + 1], sine[i * step + apart] = wanted[2 * i + 1];
            }
            table = wanted;
        }
        x += pairs.first;
        if (pairs.adjacent) {
            for (int i = 0; i < n; ++i) partner[2 * i] = x[2 * i + 1], partner[2 * i + 1] = x[2 * i];
        } else {
            memcpy(partner, x + n, n * sizeof(float));
            memcpy(partner + n, x, n * sizeof(float));
        }
        for (int k = 0; k < 2 * n; ++k) x[k] = x[k] * cosine[k] + partner[k] * sine[k];
    }
};

inline bool rotate_rows(const TileTurn& a, const CodecTables& t) {
    constexpr int kBlock = 16;
    const TileDecoder decoder(t, a.shape.side, a.tile);
    PairTurns turns(a.pairs);
    alignas(64) float x[kBlock * kMaxDim];
    bool finite = true;
    for (int first = 0; first < a.n; first += kBlock) {
        const int n = a.n - first < kBlock ? a.n - first : kBlock;
        int64_t slots[kBlock];
        for (int i = 0; i < n; ++i) {
            slots[i] = a.cells[first + i] % kTileKeys;
            float* y = x + i * t.head_dim;
            decoder.decode(t, a.shape.side, a.tile, static_cast<int>(slots[i]), y);
            turns.turn(a.tables[first + i], y);
        }
        EncodeArgs e;
        e.shape = a.shape, e.tiles = a.tile, e.x = x, e.x_stride = t.head_dim, e.cells = slots, e.n = n, e.norm_mode = a.norm_mode;
        finite &= encode(e, t);
    }
    return finite;
}

}  // namespace
}  // namespace turboquant
