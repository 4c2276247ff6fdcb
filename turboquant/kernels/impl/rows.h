// Tile slots <-> row form (codec/tile.h), decoded vectors, rotated keys: a whole tile is unpacked at once, its slots are then picked out.
#pragma once

namespace turboquant {
namespace {

constexpr int kMaxPanel = kTileKeys * kMaxDim;
constexpr int kMany = 8;  // slots of a tile that are worth packing all of it

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
    alignas(64) uint8_t panel[kMaxPanel], codes[4][kMaxDim];
    const bool in_fours = t.i8 && a.shape.side == Side::value;
    const auto slot_of = [&](int i) { return static_cast<int>(a.cells[i] % kTileKeys); };
    if (a.n < kTileKeys) unpack_codes(t, a.tile, panel);
    for (int i = 0, n; i < a.n; i += n) {
        const int slot = slot_of(i);
        n = in_fours && slot % 4 == 0 && i + 4 <= a.n && slot_of(i + 1) == slot + 1 && slot_of(i + 2) == slot + 2 &&
                    slot_of(i + 3) == slot + 3
                ? 4
                : 1;
        for (int k = 0; k < n; ++k) {
            const uint8_t* row = a.rows + (i + k) * a.row_stride;
            for_bits(t.bits, [&]<int bits>() { unpack_row<bits>(row, t.head_dim, codes[k]); });
            memcpy(a.tile + scales_at(t) + 2 * (slot + k), row + t.head_dim * t.bits / 8, 2);
        }
        if (n == 4) {
            const uint8_t* const four[] = {codes[0], codes[1], codes[2], codes[3]};
            put_four_slots(t, four, slot, panel);
        } else {
            put_slot(t, a.shape.side, codes[0], slot, panel);
        }
    }
    pack_panel(t, panel, a.tile);
}

inline void set_rows(const TileRows& a, const CodecTables& t) {
    if (a.n >= kMany && packs_panels(t)) return set_panel_rows(a, t);
    alignas(64) uint8_t codes[kMaxDim];
    for (int i = 0; i < a.n; ++i) {
        const int slot = static_cast<int>(a.cells[i] % kTileKeys);
        const uint8_t* row = a.rows + i * a.row_stride;
        if (!t.rotated) {
            put_halves(t, a.shape.side, row, slot, a.tile);
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

    // Of rotated formats: the levels, in the rotated space; returns their scale.
    float levels(const CodecTables& t, Side side, const uint8_t* tile, int slot, float* x) const {
        alignas(64) uint8_t codes[kMaxDim];
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
        return scale[0];
    }

    void decode(const CodecTables& t, Side side, const uint8_t* tile, int slot, float* x) const {
        if (!t.rotated) {
            alignas(64) uint8_t codes[2 * kMaxDim];
            pick_halves(t, side, tile, slot, codes);
            for (int i = 0; i < t.head_dim; i += Simd::kFloats) {
                uint16_t halves[Simd::kFloats];
                memcpy(halves, codes + 2 * i, sizeof halves);
                Simd::store(x + i, Simd::load_halves(halves));
            }
            return;
        }
        const float scale = levels(t, side, tile, slot, x);
        rotate(t, x, x, scale, true);
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
            // turned() of attention/turns.h, which is an inline function: none is called here (kernels.inc).
            for (int k = 0; k < d; ++k) y[k] += offset[k] * turn[k] + offset[d + k] * turn[d + k];
        }
        for (int k = 0; a.unscale && k < d; ++k) y[k] *= a.unscale[k];
        if (a.x) memcpy(a.x + i * a.stride, y, d * sizeof(float));
        if (a.halves) to_halves(y, d, a.halves + i * a.stride);
    }
}

// What the codes leave: codec/residual.h. r: the tables of turbo4.
inline void encode_residual(const CodecTables& r, const float* left, uint8_t* row) {
    const int d = r.head_dim, half = d / 2;
    alignas(64) float stretched[kMaxDim];
    alignas(64) uint8_t codes[kMaxDim];
    Simd::F top = Simd::splat(0);
    for (int i = 0; i < d; i += Simd::kFloats) top = Simd::max(top, Simd::abs(Simd::load(left + i)));
    const float most = Simd::reduce_max(top);
    if (!(most > kNoResidual)) {
        memset(row, 0, half + 2);
        return;
    }
    const float stretch = r.levels[r.half - 1] / most;
    for (int i = 0; i < d; i += Simd::kFloats) Simd::store(stretched + i, Simd::mul(Simd::load(left + i), Simd::splat(stretch)));
    float cc, yc;
    quantize<8>(r, stretched, codes, &cc, &yc);
    for (int i = 0; i < half; ++i) row[i] = static_cast<uint8_t>(codes[i] | codes[half + i] << 4);
    const uint16_t scale = to_half(yc / cc / stretch);
    memcpy(row + half, &scale, 2);
}

inline void encode_residuals(const EncodeArgs& a, uint8_t* const* rows, const CodecTables& t, const CodecTables& r) {
    alignas(64) float y[kMaxDim], code[kMaxDim];
    for (int first = 0, end; first < a.n; first = end) {
        const int64_t number = a.cells[first] / kTileKeys;
        bool any = false;
        for (end = first; end < a.n && a.cells[end] / kTileKeys == number; ++end) any |= rows[end] != nullptr;
        if (!any) continue;
        const uint8_t* tile = a.tiles + number * a.tile_stride;
        const TileDecoder decoder(t, a.shape.side, tile);
        for (int i = first; i < end; ++i) {
            if (!rows[i]) continue;
            const float* x = source(a, i, y);
            if (!(sum_of_squares(x, t.head_dim) < 1e30f)) {  // not finite, or of a size that no code has, either
                memset(rows[i], 0, t.head_dim / 2 + 2);
                continue;
            }
            rotate(t, x, y, 1, false);
            const float scale = decoder.levels(t, a.shape.side, tile, static_cast<int>(a.cells[i] % kTileKeys), code);
            for (int k = 0; k < t.head_dim; k += Simd::kFloats)
                Simd::store(y + k, Simd::sub(Simd::load(y + k), Simd::mul(Simd::splat(scale), Simd::load(code + k))));
            encode_residual(r, y, rows[i]);
        }
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
    alignas(64) uint8_t panel[kMaxPanel];  // of codes, packed in the end
    const bool packs = a.n >= kMany && packs_panels(t);
    if (packs && a.n < kTileKeys) unpack_codes(t, a.tile, panel);
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
        finite &= !packs ? encode(e, t) : encode_rotated(e, t, [&](int i, const uint8_t* codes, uint16_t scale) {
            const int slot = static_cast<int>(slots[i]);
            put_slot(t, a.shape.side, codes, slot, panel);
            memcpy(a.tile + scales_at(t) + 2 * slot, &scale, 2);
        });
    }
    if (packs) pack_panel(t, panel, a.tile);
    return finite;
}

}  // namespace
}  // namespace turboquant
