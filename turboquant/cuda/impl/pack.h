// Codes as bytes <-> words of a tile in fragment order (fragment_order.h). A *unit* is what a lane holds in one row: 32 codes, eight 32-bit
// words of bytes, word 2k + j/4, byte j%4. Codes are staged in shared memory so that a unit is read at once.
#pragma once

#include "turboquant/cuda/impl/encode_call.h"
#include "turboquant/cuda/impl/simt.h"

namespace turboquant::cuda {

/// Low (shift 0) or high (4) nibbles of 8 bytes, in order.
TQ_DEVICE std::uint32_t squeeze(std::uint32_t low, std::uint32_t high, int shift) {
    const std::uint32_t a = low >> shift & 0x0f0f0f0fu, b = high >> shift & 0x0f0f0f0fu;
    return byte_perm(a | a >> 4, b | b >> 4, 0x6420);
}

struct PackedUnit {
    std::uint32_t words[8];  ///< `count` of them, consecutive in the lane
    std::uint32_t bits;      ///< trellis formats: the word of trellis bits
};

/// Words of a unit that follow each other.
constexpr int unit_words(const FormatTables& f) { return f.family == Family::trellis ? f.bits - 1 : f.bits; }

/// All words are unions of shifted fields of the codes, so that the union of 0xff and 0 tells which of their bits belong to which codes.
TQ_DEVICE PackedUnit pack_unit(Family family, int bits, const std::uint32_t (&bytes)[8]) {
    PackedUnit u{};
    std::uint32_t n[4], h[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) n[k] = squeeze(bytes[2 * k], bytes[2 * k + 1], 0), h[k] = squeeze(bytes[2 * k], bytes[2 * k + 1], 4);
    constexpr std::uint32_t kOnes = 0x11111111u, kTwo = 3 * kOnes;
    if (family == Family::trellis) {
        const auto top = [&](int k) { return (bits == 5 ? h[k] : n[k] >> (bits - 1)) & kOnes; };
        u.bits = top(0) | top(1) << 1 | top(2) << 2 | top(3) << 3;
        switch (bits) {
            case 2:
                u.words[0] = (n[0] & kOnes) << 2 | (n[1] & kOnes) << 3 | (n[2] & kOnes) | (n[3] & kOnes) << 1;
                break;
            case 3:
                u.words[0] = (n[0] & kTwo) << 2 | (n[2] & kTwo), u.words[1] = (n[1] & kTwo) << 2 | (n[3] & kTwo);
                break;
            case 4:
                u.words[0] = (n[0] >> 2 & kOnes) | (n[1] >> 2 & kOnes) << 1 | (n[2] >> 2 & kOnes) << 2 | (n[3] >> 2 & kOnes) << 3;
                u.words[1] = (n[0] & kTwo) << 2 | (n[2] & kTwo), u.words[2] = (n[1] & kTwo) << 2 | (n[3] & kTwo);
                break;
            case 5:
                u.words[0] = n[0], u.words[1] = n[1], u.words[2] = n[2], u.words[3] = n[3];
                break;
        }
        return u;
    }
    switch (bits) {
        case 2:
            u.words[0] = (n[0] & kTwo) | (n[1] & kTwo) << 2, u.words[1] = (n[2] & kTwo) | (n[3] & kTwo) << 2;
            break;
        case 3: {
            constexpr std::uint32_t kThree = 7 * kOnes;
            u.words[0] = (n[0] & kThree) | (n[3] & kOnes) << 3, u.words[1] = (n[1] & kThree) | (n[3] >> 1 & kOnes) << 3;
            u.words[2] = (n[2] & kThree) | (n[3] >> 2 & kOnes) << 3;
            break;
        }
        case 8:
#pragma unroll
            for (int i = 0; i < 8; ++i) u.words[i] = bytes[i];
            break;
        default:
            u.words[0] = n[0], u.words[1] = n[1], u.words[2] = n[2], u.words[3] = n[3];
            if (bits == 5) u.words[4] = (h[0] & kOnes) | (h[1] & kOnes) << 1 | (h[2] & kOnes) << 2 | (h[3] & kOnes) << 3;
            if (bits == 6) u.words[4] = (h[0] & kTwo) | (h[1] & kTwo) << 2, u.words[5] = (h[2] & kTwo) | (h[3] & kTwo) << 2;
    }
    return u;
}

/// Where codes of a tile wait in shared memory until they are packed: of scalar keys by slot and dim, of the others by unit, so padded that
/// neither side meets bank conflicts.
struct Stage {
    bool by_slot;
    int rows, slot_pitch, lane_pitch;
    std::uint32_t inverse;  ///< of rows, in 1/65536: octets are fewer than 4*36

    static constexpr int kUnitPitch = 36;

    TQ_DEVICE Stage(const FormatTables& f, Side side)
        : by_slot(side == Side::key && f.family != Family::trellis),
          rows(f.rows),
          slot_pitch(f.head_dim + 4),
          lane_pitch(f.rows * kUnitPitch + 4),
          inverse(65536u / static_cast<std::uint32_t>(f.rows) + 1) {}

    static constexpr std::size_t bytes(int head_dim) {
        const std::size_t a = kTileKeys * (head_dim + 4), b = 32 * (head_dim / 16 * kUnitPitch + 4);
        return ((a > b ? a : b) + 15) / 16 * 16;
    }

    /// The byte of (slot, dim) is at of_slot() + of_dim().
    TQ_DEVICE int of_slot(Side side, int slot) const {
        if (by_slot) return slot * slot_pitch;
        const int p = fragment_position(slot), e = p >> 3;
        return side == Side::value ? (p % 8 / 2) * lane_pitch + (e >> 1) * 8 + (e & 1) + 2 * (p & 1)
                                   : 4 * (p % 8) * lane_pitch + (e & 3) * 8 + 4 * (e >> 2);
    }
    TQ_DEVICE int of_dim(Side side, int dim) const {
        if (by_slot) return dim;
        const int width = side == Side::value ? 2 * rows : 4 * rows, i = dim % width;
        return (side == Side::value ? 4 : 1) * (dim / width) * lane_pitch + i % rows * kUnitPitch +
               (side == Side::value ? 4 : 1) * (i / rows);
    }

    /// An octet of scalar keys: the pair of keys that it belongs to, and its place in that.
    struct Octet {
        int pair, at;
    };
    TQ_DEVICE Octet octet(int row, int k) const {
        const int octet = 4 * row + k, pair = static_cast<int>(static_cast<std::uint32_t>(octet) * inverse >> 16);
        return {pair, octet - pair * rows};
    }

    TQ_DEVICE void read(const std::uint8_t* stage, int lane, int row, std::uint32_t (&bytes)[8]) const {
        if (!by_slot) {
            const std::uint32_t* p = reinterpret_cast<const std::uint32_t*>(stage + lane * lane_pitch + row * kUnitPitch);
#pragma unroll
            for (int i = 0; i < 8; ++i) bytes[i] = p[i];
            return;
        }
        const int half = rows / 2, t = lane % 4;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const auto [pair, r] = octet(row, k);
            const bool shared = r >= 2 * half, second = r >= half;
            const int slot = fragment_position(8 * (2 * pair + (!shared && second)) + lane / 4);
            const int dim = 4 * rows * t + (shared ? 8 * half : 8 * (r - (second ? half : 0)));
            const std::uint32_t* p = reinterpret_cast<const std::uint32_t*>(stage + slot * slot_pitch + dim);
            bytes[2 * k] = p[0];
            if (shared) {
                const int next = fragment_position(8 * (2 * pair + 1) + lane / 4);
                bytes[2 * k + 1] = *reinterpret_cast<const std::uint32_t*>(stage + next * slot_pitch + dim);
            } else {
                bytes[2 * k + 1] = p[1];
            }
        }
    }
    /// 0xff for codes of slots that are present; `positions`: of present_positions(). Does not depend on the row but for scalar keys.
    TQ_DEVICE void read_presence(Side side, std::uint64_t positions, int lane, int row, std::uint32_t (&bytes)[8]) const {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (side == Side::value) {
                // Of e = 2k and 2k + 1, the slots 2t and 2t + 1 of each.
                const auto four = static_cast<std::uint32_t>(positions >> (16 * k + 2 * t));
                bytes[2 * k] = ((four & 1) | (four & 0x100) | (four & 2) << 15 | (four & 0x200) << 15) * 255u;
                bytes[2 * k + 1] = bytes[2 * k];
                continue;
            }
            int first = k, second = k + 4;  // e of the two words
            if (by_slot) {
                const auto [pair, r] = octet(row, k);
                const int half = rows / 2;
                first = 2 * pair + (r >= half && r < 2 * half), second = r >= 2 * half ? 2 * pair + 1 : first;
            }
            bytes[2 * k] = 0u - static_cast<std::uint32_t>(positions >> (8 * first + g) & 1);
            bytes[2 * k + 1] = 0u - static_cast<std::uint32_t>(positions >> (8 * second + g) & 1);
        }
    }
};

/// Bit fragment_position(slot) for every slot of `present`.
TQ_DEVICE std::uint64_t present_positions(std::uint64_t present) {
    return (present >> 32 << 32) | byte_perm(reverse_bits(static_cast<std::uint32_t>(present)), 0, 0x0123);
}

/// Writes the staged codes of the slots in `present` into the tile. A whole tile goes by way of `image` (tile_code_bytes), so that global
/// memory sees whole lines; else only the bits of those slots change, whatever the others do meanwhile. All threads of the block call this,
/// after the stage is complete; another sync must precede its next use.
TQ_DEVICE void write_tile(const FormatTables& f, Side side, const Thread& thread, const std::uint8_t* stage_bytes, std::uint8_t* image,
                          std::uint64_t present, std::uint8_t* tile) {
    const Stage stage(f, side);
    const Family family = f.family;
    const int rows = f.rows, bits = f.bits, code_bytes = kTileKeys * f.head_dim * f.bits / 8;
    const bool whole = present == ~std::uint64_t{0}, trellis = family == Family::trellis;
    const int n_words = rows * bits, count = trellis ? bits - 1 : bits, first = trellis ? rows : 0;
    const std::uint64_t positions = present_positions(present);
    const int lane = thread.lane();
    std::uint32_t bytes[8];
    PackedUnit mask{};
    if (!whole && !stage.by_slot) stage.read_presence(side, positions, lane, 0, bytes), mask = pack_unit(family, bits, bytes);
    for (int row = thread.warp(); row < rows; row += thread.warps()) {
        if (!whole && stage.by_slot) {
            stage.read_presence(side, positions, lane, row, bytes);
            std::uint32_t any = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i) any |= bytes[i];
            if (!any) continue;
            mask = pack_unit(family, bits, bytes);
        }
        stage.read(stage_bytes, lane, row, bytes);
        const PackedUnit u = pack_unit(family, bits, bytes);
        if (whole) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count)
                    *reinterpret_cast<std::uint32_t*>(image + fragment_word_offset(n_words, lane, first + count * row + i)) = u.words[i];
            if (trellis) *reinterpret_cast<std::uint32_t*>(image + fragment_word_offset(n_words, lane, row)) = u.bits;
            continue;
        }
        const auto put = [&](int word, std::uint32_t value, std::uint32_t of_slots) {
            if (!of_slots) return;
            auto* p = reinterpret_cast<std::uint32_t*>(tile + fragment_word_offset(n_words, lane, word));
            if (of_slots == ~0u) {
                *p = value;
                return;
            }
            // Bits of a slot have one writer. So the old ones are what was there before, whatever happens to the rest of the word.
            const std::uint32_t change = (*p ^ value) & of_slots;
            if (change) atomic_xor(p, change);
        };
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) put(first + count * row + i, u.words[i], mask.words[i]);
        if (trellis) put(row, u.bits, mask.bits);
    }
    if (!whole) return;
    sync_block();
    const int n = code_bytes / 4;
    auto* to = reinterpret_cast<std::uint32_t*>(tile);
    const auto* from = reinterpret_cast<const std::uint32_t*>(image);
#ifdef __CUDACC__
    for (int i = thread.index; i < n / 4; i += thread.count) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
#else
    for (int i = thread.index; i < n; i += thread.count) to[i] = from[i];
#endif
}

/// Byte of a slot's scale after the codes.
TQ_DEVICE int scale_at(int slot) {
    const int p = fragment_position(slot);
    return 2 * (p % 8 * 8 + p / 8);
}

}  // namespace turboquant::cuda
