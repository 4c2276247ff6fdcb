// Vectors into the rotated space by tensor cores: T = H16 (x) M with H16 the Walsh-Hadamard transform of the low four bits of the dim and M
// what is left of codec/rotation.h, head_dim/16 x head_dim/16. A vector is a matrix X of 16 x head_dim/16, dim = 16 col + row, and T x is
// H16 X M, two products. Halves are not enough for the codes to be those of the CPU: each operand but the +-1 is split into two, so that
// 22 bits of it count, and sums are float.
//
// Places of a lane = 4g + t. Operands of the first product, col = 8 tile + g: x[tile][i] is row 4t + i. Its result, and so the operands of
// the second, and the result of that: acc[tile][2a + b] is row 2g + a, col = 8 tile + 2t + b. The order of the rows within the tensor
// cores' own is that of H16's rows and columns, which are chosen for it.
#pragma once

#include "turboquant/cuda/impl/encode_call.h"
#include "turboquant/cuda/impl/simt.h"

namespace turboquant::cuda {

/// Norm that vectors have in the first product: so large that the low parts are no subnormal halves.
inline constexpr float kRotatedNorm = 256;

/// Column tiles for a head size.
constexpr int column_tiles(int head_dim) { return (head_dim + 127) / 128; }

template <int tiles>
struct Rotator {
    std::uint32_t h16[4];              // as the first operand
    std::uint32_t signs_in[tiles][2];  // sign bits of x[tile][0..1], x[tile][2..3] as halves
    std::uint32_t signs_out;           // bit 4*tile + i
    bool exact;
    std::uint32_t m_high[tiles <= 2 ? tiles * tiles : 1], m_low[tiles <= 2 ? tiles * tiles : 1];

    static TQ_DEVICE std::uint32_t hadamard(int row, int col) { return popc(static_cast<std::uint32_t>(row & col)) & 1; }

    TQ_DEVICE Rotator(const FormatTables& f, int lane) {
        const int g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 2 * g + (i & 1), col = 4 * t + 2 * (i >> 1);
            h16[i] = 0x3c003c00u ^ hadamard(row, col) << 15 ^ hadamard(row, col + 1) << 31;
        }
        signs_out = 0, exact = f.exact;
#pragma unroll
        for (int c = 0; c < tiles; ++c) {
            const int in = 16 * (8 * c + g) + 4 * t;
            const std::uint32_t s = in < f.head_dim ? f.signs_in[in / 32] >> in % 32 : 0;
            signs_in[c][0] = (s & 1) << 15 | (s >> 1 & 1) << 31;
            signs_in[c][1] = (s >> 2 & 1) << 15 | (s >> 3 & 1) << 31;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int out = dim(lane, c, i);
                if (out < f.head_dim) signs_out |= (f.signs_out[out / 32] >> out % 32 & 1) << (4 * c + i);
            }
        }
        if constexpr (tiles <= 2)
#pragma unroll
            for (int i = 0; i < tiles * tiles; ++i) m_high[i] = f.rotation_high[i * 32 + lane], m_low[i] = f.rotation_low[i * 32 + lane];
    }

    /// Dim of acc[tile][i].
    static TQ_DEVICE int dim(int lane, int tile, int i) { return 16 * (8 * tile + 2 * (lane % 4) + (i & 1)) + 2 * (lane / 4) + (i >> 1); }

    // a and b in halves, and what halves leave of them.
    static TQ_DEVICE void split(float a, float b, std::uint32_t& high, std::uint32_t& low) {
        high = pack_halves(a, b);
        const auto rounded = unpack_halves(high);
        low = pack_halves(a - rounded.x, b - rounded.y);
    }

    /// acc = T S1 x * kRotatedNorm / |x|, S2 left out (signs_out), for x * to_norm of norm kRotatedNorm.
    TQ_DEVICE void operator()(const FormatTables& f, int lane, const float (&x)[tiles][4], float to_norm, float (&acc)[tiles][4]) const {
        std::uint32_t first[tiles][4];  // of the second product
#pragma unroll
        for (int c = 0; c < tiles; ++c) {
            std::uint32_t high[2], low[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                split(x[c][2 * i] * to_norm, x[c][2 * i + 1] * to_norm, high[i], low[i]);
                high[i] ^= signs_in[c][i], low[i] ^= signs_in[c][i];
            }
            float sum[4] = {};
            mma_halves(sum, h16, low[0], low[1]);
            mma_halves(sum, h16, high[0], high[1]);
            split(sum[0], sum[1], first[c][0], first[c][2]);
            split(sum[2], sum[3], first[c][1], first[c][3]);
        }
#pragma unroll
        for (int c = 0; c < tiles; ++c) {
            acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0;
#pragma unroll
            for (int k = 0; k < tiles; ++k) {
                const int i = k * tiles + c;
                const std::uint32_t high = tiles <= 2 ? m_high[tiles <= 2 ? i : 0] : f.rotation_high[i * 32 + lane];
                // Zeros for powers of two; no branch, so that vectors can be interleaved.
                if (tiles <= 2 || !exact)
                    mma_halves(acc[c], first[k], tiles <= 2 ? m_low[tiles <= 2 ? i : 0] : f.rotation_low[i * 32 + lane], 0);
                mma_halves(acc[c], first[k], high, high);
            }
        }
    }
};

TQ_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) v += shfl_xor(v, d);
    return v;
}

/// A vector as it was read, less its offset, and its norm.
struct Norm {
    float norm, unit;  ///< the norm is norm / unit
    float to_norm;     ///< factor to kRotatedNorm; 0 for a vector of zeros
};

/// A lane's part of the squared norm.
template <int tiles>
TQ_DEVICE float square_of(const float (&x)[tiles][4]) {
    float s = 0;
#pragma unroll
    for (int c = 0; c < tiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) s = fmaf(x[c][i], x[c][i], s);
    return s;
}
/// Whether a squared norm is good enough as it is.
TQ_DEVICE bool common_square(float s) { return s > 1e-25f && s < 1e30f; }
TQ_DEVICE Norm norm_of(float square, float unit) {
    const float inverse = square > 0 ? reciprocal_sqrt(square) : 0;
    return {square * inverse, unit, kRotatedNorm * inverse};
}

/// Takes vectors that are not finite for zero and says so; squares beyond the range of float are formed from scaled values. `square`: of
/// x, of the whole vector.
template <int tiles>
TQ_DEVICE Norm measure_norm(float (&x)[tiles][4], float square, std::uint32_t* not_finite) {
    if (common_square(square)) return norm_of(square, 1);  // the same in all lanes
    bool finite = true;
#pragma unroll
    for (int c = 0; c < tiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) finite &= fabsf(x[c][i]) <= 3.4028234e38f;
    const bool good = ballot(!finite) == 0;
    if (!good) atomic_or(not_finite, 1);
    const float unit = square > 1 ? 0x1p-100f : 0x1p100f;
#pragma unroll
    for (int c = 0; c < tiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[c][i] = good ? x[c][i] * unit : 0;
    const float s = warp_sum(square_of<tiles>(x));
    return norm_of(s > 1e-30f ? s : 0, unit);
}

/// The fp16 scale that is stored.
TQ_DEVICE std::uint16_t stored_scale(const Norm& n, NormMode mode, float cc, float yc) {
    const float factor = mode == NormMode::plain ? 1 : mode == NormMode::corrected ? reciprocal_sqrt(cc) : 1 / yc;
    return half_bits(n.norm > 0 ? n.norm * factor / n.unit : 0);
}

/// Values of vectors of a head as the rotation takes them, scaled, less the key offset; zeros for a token that is negative. All loads of a
/// kind are issued before the first is waited for.
template <int tiles, int n>
TQ_DEVICE void load_vectors(const EncodeCall& a, int head_dim, int head, const int (&token)[n], int lane, float (&x)[n][tiles][4]) {
    const int first = 16 * (lane / 4) + 4 * (lane % 4);
    // Lanes beyond the head's end read its beginning.
    const auto dim = [&](int c) { return first + 128 * c < head_dim ? first + 128 * c : 0; };
    const auto at = [&](int v, int c) {
        return static_cast<std::size_t>(token[v] < 0 ? 0 : token[v]) * a.token_stride + head * a.head_stride + dim(c);
    };
    if (a.half_input) {
        std::uint32_t words[n][tiles][2];
#pragma unroll
        for (int v = 0; v < n; ++v)
#pragma unroll
            for (int c = 0; c < tiles; ++c) load_words(static_cast<const std::uint16_t*>(a.x) + at(v, c), words[v][c]);
#pragma unroll
        for (int v = 0; v < n; ++v)
#pragma unroll
            for (int c = 0; c < tiles; ++c) {
                const auto low = unpack_halves(words[v][c][0]), high = unpack_halves(words[v][c][1]);
                x[v][c][0] = low.x, x[v][c][1] = low.y, x[v][c][2] = high.x, x[v][c][3] = high.y;
            }
    } else {
#pragma unroll
        for (int v = 0; v < n; ++v)
#pragma unroll
            for (int c = 0; c < tiles; ++c) load_floats(static_cast<const float*>(a.x) + at(v, c), x[v][c]);
    }
    if (a.scales) {
#pragma unroll
        for (int c = 0; c < tiles; ++c) {
            float scale[4];
            load_floats(a.scales + static_cast<std::size_t>(head) * head_dim + dim(c), scale);
#pragma unroll
            for (int v = 0; v < n; ++v)
#pragma unroll
                for (int i = 0; i < 4; ++i) x[v][c][i] *= scale[i];
        }
    }
    if (a.turns) {
#pragma unroll
        for (int v = 0; v < n; ++v) {
            const std::size_t t = token[v] < 0 ? 0 : token[v];
            const int id = a.offset_ids[t];
            const float* turn = a.turns + t * 2 * head_dim;
            const float* offset = a.offsets + (id < 0 ? 0 : id) * a.offset_stride + static_cast<std::size_t>(head) * 2 * head_dim;
#pragma unroll
            for (int c = 0; c < tiles; ++c) {
                float cosines[4], sines[4], even[4], odd[4];
                load_floats(turn + dim(c), cosines), load_floats(turn + head_dim + dim(c), sines);
                load_floats(offset + dim(c), even), load_floats(offset + head_dim + dim(c), odd);
#pragma unroll
                for (int i = 0; i < 4; ++i) x[v][c][i] = id < 0 ? x[v][c][i] : x[v][c][i] - fmaf(even[i], cosines[i], odd[i] * sines[i]);
            }
        }
    }
#pragma unroll
    for (int v = 0; v < n; ++v)
#pragma unroll
        for (int c = 0; c < tiles; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[v][c][i] = token[v] >= 0 && first + 128 * c < head_dim ? x[v][c][i] : 0;
}

/// Sums over the warp of n values a lane, n a power of two: that of value k is in the lanes 32/n * k and after it.
template <int n>
TQ_DEVICE float warp_sums(int lane, const float (&v)[n]) {
    float s[n];
#pragma unroll
    for (int i = 0; i < n; ++i) s[i] = v[i];
    int width = 32;
#pragma unroll
    for (int m = n; m > 1; m /= 2) {
        width /= 2;
        const bool upper = lane & width;
#pragma unroll
        for (int i = 0; i < m / 2; ++i) {
            const float keep = upper ? s[i + m / 2] : s[i], give = upper ? s[i] : s[i + m / 2];
            s[i] = keep + shfl_xor(give, width);
        }
    }
#pragma unroll
    for (int d = 16 / n; d > 0; d /= 2) s[0] += shfl_xor(s[0], d);
    return s[0];
}

}  // namespace turboquant::cuda
