// Bodies of the kernels of rows.h: one warp per (cell, head), a thread at a time of simple arithmetic; none of them is in the way of a
// token.
#pragma once

#include "turboquant/attention/turns.h"
#include "turboquant/codec/trellis.h"
#include "turboquant/cuda/impl/encode_call.h"
#include "turboquant/cuda/impl/simt.h"
#include "turboquant/cuda/rows.h"

namespace turboquant::cuda {

/// A slot of a head's tile.
struct SlotView {
    const FormatTables& f;
    Side side;
    std::uint8_t* tile;
    int slot;

    TQ_DEVICE std::uint32_t* word(const FragmentBit& b) const {
        return reinterpret_cast<std::uint32_t*>(tile + fragment_word_offset(f.rows * f.bits, b.lane, b.word));
    }
    TQ_DEVICE std::uint16_t* scale() const {
        const int p = fragment_position(slot);
        return reinterpret_cast<std::uint16_t*>(tile + kTileKeys * f.head_dim * f.bits / 8 + 2 * (p % 8 * 8 + p / 8));
    }
    /// Code of a dim as the codec knows it; raw: the fp16 bits.
    TQ_DEVICE std::uint32_t get(int dim) const {
        if (f.family == Family::raw) {
            const FragmentBit b = fragment_bit(FragmentFormat{f.family, f.bits}, side, f.head_dim, slot, dim, 0);
            return *word(b) >> b.shift & 0xffff;
        }
        std::uint32_t stored = 0;
        for (int i = 0; i < f.bits; ++i) {
            const FragmentBit b = fragment_bit(FragmentFormat{f.family, f.bits}, side, f.head_dim, slot, dim, i);
            stored |= (*word(b) >> b.shift & 1) << i;
        }
        return code_of_fragment(f.codec, stored);
    }
    /// Only this slot's bits change, whatever happens to others of the word.
    TQ_DEVICE void set(int dim, std::uint32_t code) const {
        if (f.family == Family::raw) {
            const FragmentBit b = fragment_bit(FragmentFormat{f.family, f.bits}, side, f.head_dim, slot, dim, 0);
            reinterpret_cast<std::uint16_t*>(word(b))[b.shift / 16] = static_cast<std::uint16_t>(code);
            return;
        }
        const std::uint32_t stored = fragment_code(f.codec, code);
        for (int i = 0; i < f.bits; ++i) {
            const FragmentBit b = fragment_bit(FragmentFormat{f.family, f.bits}, side, f.head_dim, slot, dim, i);
            std::uint32_t* p = word(b);
            if ((*p >> b.shift ^ stored >> i) & 1) atomic_xor(p, 1u << b.shift);
        }
    }
};

TQ_DEVICE SlotView slot_view(const HeadFormat& head, Side side, std::uint8_t* tiles, std::size_t tile_stride, std::int64_t cell) {
    return {*head.tables, side, tiles + head.at + static_cast<std::size_t>(cell / kTileKeys) * tile_stride,
            static_cast<int>(cell % kTileKeys)};
}

/// A lane's eight codes at a time are `bits` bytes of the row.
TQ_DEVICE void get_row(const EncodePlan& plan, std::int64_t cell, int head, int lane, std::uint8_t* rows) {
    const HeadFormat& format = plan.heads[head];
    const FormatTables& f = *format.tables;
    std::uint8_t* row = rows + format.row_at;
    const int bytes = f.head_dim * f.bits / 8;
    const bool rotated = f.family != Family::raw;
    if (cell < 0) {
        for (int i = lane; i < bytes + 2 * rotated; i += 32) row[i] = 0;
        return;
    }
    const SlotView s = slot_view(format, plan.side, plan.tiles, plan.tile_stride, cell);
    for (int block = lane; block < f.head_dim / 8; block += 32) {
        std::uint64_t bits[2] = {0, 0};  // of 8 codes of up to 16 bits
        for (int i = 0; i < 8; ++i) {
            const int at = i * f.bits;
            bits[at / 64] |= static_cast<std::uint64_t>(s.get(8 * block + i)) << at % 64;
            if (at % 64 + f.bits > 64) bits[1] |= static_cast<std::uint64_t>(s.get(8 * block + i)) >> (64 - at % 64);
        }
        for (int i = 0; i < f.bits; ++i) row[block * f.bits + i] = static_cast<std::uint8_t>(bits[i / 8] >> 8 * (i % 8));
    }
    if (rotated && lane < 2) row[bytes + lane] = reinterpret_cast<const std::uint8_t*>(s.scale())[lane];
}

TQ_DEVICE void set_row(const EncodePlan& plan, std::int64_t cell, int head, int lane, const std::uint8_t* rows) {
    if (cell < 0) return;
    const HeadFormat& format = plan.heads[head];
    const FormatTables& f = *format.tables;
    const std::uint8_t* row = rows + format.row_at;
    const SlotView s = slot_view(format, plan.side, plan.tiles, plan.tile_stride, cell);
    for (int dim = lane; dim < f.head_dim; dim += 32) {
        std::uint32_t code = 0;
        for (int i = 0; i < f.bits; ++i) {
            const int at = dim * f.bits + i;
            code |= (row[at / 8] >> at % 8 & 1u) << i;
        }
        s.set(dim, code);
    }
    const int bytes = f.head_dim * f.bits / 8;
    if (f.family != Family::raw && lane == 0) *s.scale() = static_cast<std::uint16_t>(row[bytes] | row[bytes + 1] << 8);
}

/// x, in shared memory: S1 T S2 x.
TQ_DEVICE void rotate_back(const FormatTables& f, int lane, float* x) {
    const auto negate = [&](const std::uint32_t* signs) {
        for (int d = lane; d < f.head_dim; d += 32) x[d] = flip(x[d], signs[d / 32] >> d % 32 & 1);
        sync_warp();
    };
    negate(f.signs_out);
    for (int h = 1; h < f.pow2; h *= 2) {
        for (int i = lane; i < f.head_dim / 2; i += 32) {
            const int at = i / h * 2 * h + i % h;
            const float a = x[at], b = x[at + h];
            x[at] = a + b, x[at + h] = a - b;
        }
        sync_warp();
    }
    const float norm = reciprocal_sqrt(static_cast<float>(f.pow2));
    for (int i = lane; i < f.pow2; i += 32) {
        float from[9];
        for (int j = 0; j < f.odd; ++j) from[j] = x[j * f.pow2 + i];
        for (int l = 0; l < f.odd; ++l) {
            float sum = 0;
            for (int j = 0; j < f.odd; ++j) sum = fmaf(f.hartley[l * f.odd + j], from[j], sum);
            x[l * f.pow2 + i] = sum * norm;
        }
    }
    sync_warp();
    negate(f.signs_in);
}

/// `x`: head_dim floats of shared memory, `codes` as many bytes.
TQ_DEVICE void decode_row(const EncodePlan& plan, const DecodeArgs& a, int token, int head, int lane, float* x, std::uint8_t* codes) {
    const HeadFormat& format = plan.heads[head];
    const FormatTables& f = *format.tables;
    const std::int64_t cell = a.cells[token];
    const int dim = f.head_dim;
    if (cell < 0) {
        for (int d = lane; d < dim; d += 32) x[d] = 0;
        sync_warp();
    } else {
        const SlotView s = slot_view(format, plan.side, plan.tiles, plan.tile_stride, cell);
        if (f.family == Family::raw) {
            for (int d = lane; d < dim; d += 32) x[d] = half_value(static_cast<std::uint16_t>(s.get(d)));
            sync_warp();
        } else {
            for (int d = lane; d < dim; d += 32) codes[d] = static_cast<std::uint8_t>(s.get(d));
            sync_warp();
            const float scale = half_value(*s.scale());
            for (int d = lane; d < dim; d += 32) {
                const int code = codes[d];
                float level;
                if (f.family == Family::trellis) {
                    std::uint32_t window = 0;
                    for (int k = 0; k <= kTrellisMemory; ++k) window |= (codes[(d + dim - k) % dim] >> (f.bits - 1) & 1u) << k;
                    const int subset = 2 * (popc(window & kTrellisH0) & 1) + (popc(window & kTrellisH1) & 1);
                    level = f.levels[4 + 4 * (code & ((1 << (f.bits - 1)) - 1)) + subset];
                } else {
                    level = code >= f.half ? f.levels[code] : -f.levels[2 * f.half - 1 - code];
                }
                x[d] = level * scale;
            }
            sync_warp();
            rotate_back(f, lane, x);
        }
        if (a.shift_turns) {
            const float* turn = a.shift_turns + static_cast<std::size_t>(token) * 2 * dim;
            for (int i = lane; i < a.rope.n_dims / 2; i += 32) {
                const int p = a.rope.n_offset + (a.rope.adjacent ? 2 * i : i), q = p + (a.rope.adjacent ? 1 : a.rope.n_dims / 2);
                const float u = x[p], v = x[q];
                x[p] = u * turn[p] - v * turn[dim + p];
                x[q] = v * turn[q] + u * turn[dim + q];
            }
            sync_warp();
        }
    }
    const int id = cell >= 0 && a.turns ? a.offset_ids[token] : -1;
    const float* turn = a.turns + static_cast<std::size_t>(token) * 2 * dim;
    const float* offset = a.offsets + id * a.offset_stride + static_cast<std::size_t>(head) * 2 * dim;
    for (int d = lane; d < dim; d += 32) {
        float v = x[d];
        // turned() of attention/turns.h, which is no function of the device.
        if (id >= 0) v += fmaf(offset[d], turn[d], offset[dim + d] * turn[dim + d]);
        if (a.scales) v /= a.scales[static_cast<std::size_t>(head) * dim + d];
        const std::size_t at = token * a.token_stride + head * a.head_stride + d;
        if (a.out_is_half)
            static_cast<std::uint16_t*>(a.out)[at] = half_bits(v);
        else
            static_cast<float*>(a.out)[at] = v;
    }
}

/// attention/turns.h's turn_row for the frequency of one dim.
TQ_DEVICE void spread_turn_value(const float* digits, int width, const RopeLayout& rope, int head_dim, std::int32_t pos, int dim,
                                 float* out) {
    const int at = dim - rope.n_offset;
    float c = 1, s = 0;
    if (pos >= 0 && at >= 0 && at < rope.n_dims) {
        const int i = rope.adjacent ? at / 2 : at % (rope.n_dims / 2);
        for (int k = 0, rest = pos; k < kTurnDigits && (k == 0 || rest); ++k, rest /= kTurnRadix) {
            const float* row = digits + static_cast<std::size_t>(k * kTurnRadix + rest % kTurnRadix) * 2 * width;
            const float by_c = row[i], by_s = row[width + i], cosine = c * by_c - s * by_s;
            s = s * by_c + c * by_s, c = cosine;
        }
    }
    out[dim] = c, out[head_dim + dim] = s;
}

}  // namespace turboquant::cuda
