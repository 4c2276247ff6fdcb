// Compiled with -ffp-contract=off: a fused multiply-add in the norm or the butterflies would change bytes at cell borders.
#include "turboquant/codec/compat.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "turboquant/codec/quantizer.h"

namespace turboquant::compat {
namespace {

// Positive halves of the tables and of their decision borders (the border at 0 is implied), already in units of 1/sqrt(128).
struct Table {
    int bits;
    float level[8], border[7];

    int half() const { return 1 << (bits - 1); }
    float centroid(int i) const { return i >= half() ? level[i - half()] : -level[half() - 1 - i]; }
    int index(float v) const {  // the number of borders <= v, so the upper cell on ties
        int i = !(v < 0);
        for (int k = 0; k < half() - 1; ++k) i += !(v < border[k]) + !(v < -border[k]);
        return i;
    }
};

constexpr Table kTwoBit{2, {.039994f, .133462f}, {.086728f}};
constexpr Table kThreeBit{3, {.021460f, .065717f, .117832f, .190685f}, {.043589f, .091775f, .154259f}};
constexpr Table kFourBitOld{4,
                            {.006938f, .020989f, .035597f, .051262f, .068756f, .089527f, .117195f, .173926f},
                            {.013963f, .028293f, .043430f, .060009f, .079142f, .103361f, .145560f}};
constexpr Table kFourBitLloyd{4,
                              {.011349f, .034299f, .058050f, .083292f, .111036f, .143016f, .182877f, .241529f},
                              {.022824f, .0461745f, .070671f, .097164f, .127026f, .1629465f, .212203f}};

// 128 random signs each, first sign in the highest bit, 1 = plus.
using Signs = std::uint64_t[2];
constexpr Signs kSigns1{0x653fa9d86d65e0bd, 0x22239cda6af5b06d}, kSigns2{0xf688ca97c40eb903, 0xa1535a12b9595a82};

float sign(const Signs& s, int i) { return s[i / 64] >> (63 - i % 64) & 1 ? 1.f : -1.f; }

void rotate(std::span<float, kBlockValues> x, const Signs& in, const Signs& out) {
    for (int i = 0; i < kBlockValues; ++i) x[i] *= sign(in, i);
    for (int h = 1; h < kBlockValues; h *= 2)
        for (int i = 0; i < kBlockValues; i += 2 * h)
            for (int j = i; j < i + h; ++j) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int i = 0; i < kBlockValues; ++i) x[i] *= 0.08838834764831845f * sign(out, i);
}

const Table& table_of(Block b, Table4 table4) {
    if (b == Block::turbo2) return kTwoBit;
    if (b == Block::turbo3) return kThreeBit;
    return table4 == Table4::old ? kFourBitOld : kFourBitLloyd;
}

std::size_t header_bytes(Block b) { return b == Block::turbo4_rnorm ? 4 : 2; }

// One code of the packed part (all after the header): low bits in qs; turbo3's high bit in the signs after its 32 bytes of qs.
int load_code(const std::uint8_t* qs, int bits, int j) {
    if (bits == 4) return qs[j / 2] >> (j % 2 * 4) & 15;
    const int low = qs[j / 4] >> (j % 4 * 2) & 3;
    return bits == 2 ? low : low | (qs[32 + j / 8] >> (j % 8) & 1) << 2;
}

void store_code(std::uint8_t* qs, int bits, int j, int code) {  // into zeroed bytes
    const auto add = [&](int byte, int v) { qs[byte] = static_cast<std::uint8_t>(qs[byte] | v); };
    if (bits == 4) return add(j / 2, code << (j % 2 * 4));
    add(j / 4, (code & 3) << (j % 4 * 2));
    if (bits == 3) add(32 + j / 8, code >> 2 << (j % 8));
}

void check_bytes(Block b, std::size_t got) {
    if (got != block_bytes(b))
        throw std::invalid_argument("compat: a block of this type has " + std::to_string(block_bytes(b)) + " bytes, got " +
                                    std::to_string(got));
}

}  // namespace

std::size_t block_bytes(Block b) { return header_bytes(b) + static_cast<std::size_t>(kBlockValues) * table_of(b, Table4::old).bits / 8; }

void encode(Block b, std::span<const float, kBlockValues> x, std::span<std::uint8_t> out, Table4 table4) {
    check_bytes(b, out.size());
    const Table& table = table_of(b, table4);
    float norm_sq = 0;
    for (float v : x) norm_sq += v * v;
    if (!std::isfinite(norm_sq))
        throw std::domain_error("compat: the block's norm is not finite; check its values for NaN, infinity or overflow");
    const float norm = std::sqrt(norm_sq), inverse = norm > 1e-10f ? 1 / norm : 0;
    float y[kBlockValues];
    for (int i = 0; i < kBlockValues; ++i) y[i] = x[i] * inverse;
    rotate(y, kSigns1, kSigns2);

    std::fill(out.begin(), out.end(), std::uint8_t{0});
    float recon_sq = 0;
    for (int i = 0; i < kBlockValues; ++i) {
        const int code = table.index(y[i]);
        const float c = table.centroid(code);
        recon_sq += c * c;
        store_code(out.data() + header_bytes(b), table.bits, i, code);
    }
    const float recon = std::sqrt(recon_sq);
    const std::uint16_t half = to_half(recon > 1e-10f ? norm / recon : norm);
    out[0] = static_cast<std::uint8_t>(half);
    out[1] = static_cast<std::uint8_t>(half >> 8);
}

void decode(Block b, std::span<const std::uint8_t> in, std::span<float, kBlockValues> y, bool unrotate, Table4 table4) {
    check_bytes(b, in.size());
    const Table& table = table_of(b, table4);
    const float norm = from_half(static_cast<std::uint16_t>(in[0] | in[1] << 8));
    for (int i = 0; i < kBlockValues; ++i) y[i] = table.centroid(load_code(in.data() + header_bytes(b), table.bits, i)) * norm;
    if (unrotate) rotate(y, kSigns2, kSigns1);
}

}  // namespace turboquant::compat
