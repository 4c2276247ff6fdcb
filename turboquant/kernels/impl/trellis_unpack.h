// Trellis codes -> int8 panel: codec/trellis.h's shifts and XORs on whole bit planes, then look-ups.
#pragma once

namespace turboquant {
namespace {

constexpr uint32_t kH[2] = {kTrellisH1, kTrellisH0};  // of z0, of z1

// Vectors of 64-bit words: shifts and XORs need no intrinsics.
constexpr int kWords = Simd::kBytes / 8;
typedef uint64_t Words __attribute__((vector_size(Simd::kBytes)));

// The planes of a whole tile in the panel's order, 4 words a unit.
struct TrellisPlanes {
    static constexpr int kMax = kMaxHeadDim;
    alignas(64) uint64_t z[2][kMax];  // z0, z1

    // Of a key tile: the dim before is one bit lower in its group of 4, or at the group's top in the unit before.
    void from_keys(const uint8_t* plane, size_t stride, int n_units) {
        alignas(64) uint64_t u[8 + kMax];
        for (int i = 0; i < n_units; ++i) memcpy(u + 8 + 4 * i, plane + i * stride, 32);
        memcpy(u, u + 4 * n_units, 64);
        for (int i = 0; i < 4 * n_units; i += kWords) {
            Words ago[3];  // this unit, the one before, the one before that
            for (int q = 0; q < 3; ++q) memcpy(&ago[q], u + i + 8 - 4 * q, sizeof(Words));
            for (int p = 0; p < 2; ++p) {
                Words sum{};
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) {
                    Words same{}, before{};
                    for (int q = 0; q < 2; ++q)
                        if (kH[p] >> (4 * q + r) & 1) same ^= ago[q], before ^= ago[q + 1];
                    const uint64_t low = 0x1111111111111111u * ((1u << r) - 1);  // the r low bits of each group
                    sum ^= r == 0 ? same : (same << r & ~low) | (before >> (4 - r) & low);
                }
                memcpy(z[p] + i, &sum, sizeof sum);
            }
        }
    }

    // Of a value tile: the dim before is 4 bits lower, or at the top of the word before; head_dim/16 words are a ring.
    void from_values(const uint8_t* plane, size_t stride, int n_units) {
        alignas(64) uint64_t u[kMax], before[kMax];
        for (int i = 0; i < n_units; ++i) memcpy(u + 4 * i, plane + i * stride, 32);
        const int n = n_units / 4;
        for (int g = 0; g < 4 * n_units; g += n) {
            memcpy(before + g + 1, u + g, 8 * (n - 1));
            before[g] = u[g + n - 1];
        }
        for (int i = 0; i < 4 * n_units; i += kWords) {
            Words now, last;
            memcpy(&now, u + i, sizeof now);
            memcpy(&last, before + i, sizeof last);
            for (int p = 0; p < 2; ++p) {
                Words sum{};
#pragma GCC unroll 8
                for (int k = 0; k <= kTrellisMemory; ++k)
                    if (kH[p] >> k & 1) sum ^= k == 0 ? now : now << 4 * k ^ last >> (64 - 4 * k);
                memcpy(z[p] + i, &sum, sizeof sum);
            }
        }
    }
};

template <int bits>
inline void unpack_trellis_bits(const uint8_t* codes, const TrellisPlanes& planes, int n_units, const Lut& table, uint8_t* panel) {
    const Lut lut = table;
    for (int u = 0; u < n_units; ++u, codes += 32 * bits, panel += 256) {
        const uint8_t *z0 = reinterpret_cast<const uint8_t*>(planes.z[0] + 4 * u),
                      *z1 = reinterpret_cast<const uint8_t*>(planes.z[1] + 4 * u);
        const auto store = [&](int at, Simd::B index) {
            if constexpr (bits == 5) {
                const Simd::B even = Simd::lookup16_if_bits(z0 + at / 8, Simd::lookup16(lut.part[0], index), lut.part[1], index),
                              odd = Simd::lookup16_if_bits(z0 + at / 8, Simd::lookup16(lut.part[2], index), lut.part[3], index);
                Simd::store_bytes(panel + at, Simd::select_bits(z1 + at / 8, even, odd));
            } else {
                index = Simd::or_if_bits(z0 + at / 8, index, 1 << (bits - 1));
                Simd::store_bytes(panel + at, Simd::lookup16_if_bits(z1 + at / 8, Simd::lookup16(lut.part[0], index), lut.part[1], index));
            }
        };
        if constexpr (bits == 1) {
            for (int at = 0; at < 256; at += Simd::kBytes) store(at, Simd::splat_bytes(0));
        } else if constexpr (bits == 2) {
            for (int at = 0; at < 256; at += Simd::kBytes) store(at, Simd::or_if_bits(codes + at / 8, Simd::splat_bytes(0), 1));
        } else {
            for (int o = 0; o < 64; o += Simd::kBytes)
                for_each_2bit_run(Simd::load_bytes(codes + o), [&](int r, Simd::B v) {
                    Simd::B index = Simd::and_bytes(v, 3);
                    if constexpr (bits >= 4) index = Simd::or_if_bits(codes + 64 + 8 * r + o / 8, index, 4);
                    if constexpr (bits == 5) index = Simd::or_if_bits(codes + 96 + 8 * r + o / 8, index, 8);
                    store(64 * r + o, index);
                });
        }
    }
}

inline void unpack_trellis(const CodecTables& t, Side side, const uint8_t* codes, const Lut& lut, uint8_t* panel) {
    const int n_units = t.head_dim / 4;
    const size_t stride = static_cast<size_t>(32) * t.bits;
    TrellisPlanes planes;
    if (side == Side::key)
        planes.from_keys(codes + stride - 32, stride, n_units);
    else
        planes.from_values(codes + stride - 32, stride, n_units);
    switch (t.bits) {
        case 1:
            return unpack_trellis_bits<1>(codes, planes, n_units, lut, panel);
        case 2:
            return unpack_trellis_bits<2>(codes, planes, n_units, lut, panel);
        case 3:
            return unpack_trellis_bits<3>(codes, planes, n_units, lut, panel);
        case 4:
            return unpack_trellis_bits<4>(codes, planes, n_units, lut, panel);
        case 5:
            return unpack_trellis_bits<5>(codes, planes, n_units, lut, panel);
    }
}

}  // namespace
}  // namespace turboquant
