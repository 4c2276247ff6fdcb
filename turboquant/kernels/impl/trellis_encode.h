// The Viterbi search of codec/trellis.h: bytes of metric, a register's worth of states at a time, several vectors in step.
#pragma once

namespace turboquant {
namespace {

constexpr int kStates = 1 << kTrellisMemory, kTrellisMaxDim = kMaxHeadDim;

// What the search knows of one vector.
struct TrellisVector {
    alignas(64) uint8_t cost[4 * kTrellisMaxDim];     // [value][subset]
    alignas(64) uint8_t point[4 * kTrellisMaxDim];    // nearest of the subset
    alignas(64) uint8_t oldest[16 * kTrellisMaxDim];  // [step][trellis bit]: 64 bits of state/2: oldest bit of the way taken
    uint8_t bit[kTrellisMaxDim + 8];                  // trellis bits of values -8.., a ring
};

template <int n_points>
inline void measure(const CodecTables& t, const float* y, TrellisVector* v) {
    alignas(64) uint8_t cost[4][kTrellisMaxDim], point[4][kTrellisMaxDim];
    for (int i = 0; i < t.head_dim; i += Simd::kFloats) {
        const Simd::F x = Simd::load(y + i);
        Simd::F square[4], least{};
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            Simd::F index = Simd::splat(0), level = Simd::splat(t.trellis_levels[k][0]);
            for (int p = 1; p < n_points; ++p) {
                const Simd::M above = Simd::greater_equal(x, Simd::splat(t.trellis_bounds[k][p - 1]));
                index = Simd::add_if(above, index, Simd::splat(1));
                level = Simd::select(above, level, Simd::splat(t.trellis_levels[k][p]));
            }
            Simd::store_as_bytes(point[k] + i, index);
            const Simd::F distance = Simd::sub(x, level);
            square[k] = Simd::mul(distance, distance);
            least = k == 0 ? square[0] : Simd::min(least, square[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k)
            Simd::store_as_bytes(cost[k] + i,
                                 Simd::min(Simd::mul(Simd::sub(square[k], least), Simd::splat(t.trellis_cost_scale)), Simd::splat(255)));
    }
    for (int i = 0; i < t.head_dim; ++i)
        for (int k = 0; k < 4; ++k) v->cost[4 * i + k] = cost[k][i], v->point[4 * i + k] = point[k][i];
}

// Metrics of all states of n vectors, in the order of the states.
template <int n>
struct Search {
    static constexpr int kRegs = kStates / Simd::kBytes, kHalf = kRegs / 2;
    Simd::B metric[n][kRegs];

    // Steps over the values first.. of a ring of head_dim, from metric on.
    void run(const CodecTables& t, TrellisVector* v, int first, int steps) {
        Simd::B subset[kHalf], other[kHalf];
        for (int r = 0; r < kHalf; ++r) {
            alignas(64) uint8_t further[64];
            for (int j = 0; j < 64; ++j) further[j] = t.trellis_subset[j] ^ 2;
            subset[r] = Simd::load_bytes(t.trellis_subset + r * Simd::kBytes);
            other[r] = Simd::load_bytes(further + r * Simd::kBytes);
        }
        for (int i = 0, at = first; i < steps; ++i, at = at + 1 < t.head_dim ? at + 1 : 0) {
#pragma GCC unroll 4
            for (int k = 0; k < n; ++k) {
                const Simd::B cost = Simd::splat_dword(v[k].cost + 4 * at);
                uint8_t* oldest = v[k].oldest + 16 * i;
                Simd::B even[kHalf], odd[kHalf];
#pragma GCC unroll 8
                for (int r = 0; r < kHalf; ++r) {
                    const Simd::B a = Simd::lookup16(cost, subset[r]), b = Simd::lookup16(cost, other[r]);
                    const Simd::B low = metric[k][r], high = metric[k][r + kHalf];
                    const Simd::B even0 = Simd::add_saturating(low, a), even1 = Simd::add_saturating(high, b);
                    const Simd::B odd0 = Simd::add_saturating(low, b), odd1 = Simd::add_saturating(high, a);
                    Simd::store_less(oldest + r * Simd::kBytes / 8, even1, even0);
                    Simd::store_less(oldest + 8 + r * Simd::kBytes / 8, odd1, odd0);
                    even[r] = Simd::min_bytes(even0, even1);
                    odd[r] = Simd::min_bytes(odd0, odd1);
                }
#pragma GCC unroll 8
                for (int r = 0; r < kHalf; ++r) Simd::interleave(even[r], odd[r], &metric[k][2 * r], &metric[k][2 * r + 1]);
            }
            if (i % kTrellisNormalizeEvery == kTrellisNormalizeEvery - 1) normalize();
        }
    }

    void normalize() {
        for (int k = 0; k < n; ++k) {
            Simd::B least = metric[k][0];
            for (int r = 1; r < kRegs; ++r) least = Simd::min_bytes(least, metric[k][r]);
            const Simd::B base = Simd::splat_bytes(Simd::reduce_min_bytes(least));
            for (int r = 0; r < kRegs; ++r) metric[k][r] = Simd::sub_bytes(metric[k][r], base);
        }
    }

    void start_anywhere() {
        for (auto& m : metric)
            for (Simd::B& r : m) r = Simd::splat_bytes(0);
    }
    void start_at(const uint32_t* state) {
        for (int k = 0; k < n; ++k) {
            alignas(64) uint8_t m[kStates];
            memset(m, 255, sizeof m);
            m[state[k]] = 0;
            for (int r = 0; r < kRegs; ++r) metric[k][r] = Simd::load_bytes(m + r * Simd::kBytes);
        }
    }
    void best(uint32_t* state) const {
        for (int k = 0; k < n; ++k) {
            alignas(64) uint8_t m[kStates];
            for (int r = 0; r < kRegs; ++r) Simd::store_bytes(m + r * Simd::kBytes, metric[k][r]);
            state[k] = 0;
            for (uint32_t s = 1; s < kStates; ++s)
                if (m[s] < m[state[k]]) state[k] = s;
        }
    }

    // From the states after step last-1 back to those before step first; leaves the trellis bits in passing.
    static void trace(TrellisVector* v, int first, int last, uint32_t* state) {
        for (int i = last; i-- > first;)
#pragma GCC unroll 4
            for (int k = 0; k < n; ++k) {
                const uint32_t s = state[k];
                uint64_t oldest;
                memcpy(&oldest, v[k].oldest + 16 * i + 8 * (s & 1), 8);
                v[k].bit[8 + i] = static_cast<uint8_t>(s & 1);
                state[k] = s >> 1 | static_cast<uint32_t>(oldest >> (s >> 1) & 1) << (kTrellisMemory - 1);
            }
    }
};

// Codes of n rotated unit vectors; cc and yc: <c,c> and <y,c>.
template <int n>
inline void quantize_trellis(const CodecTables& t, const float (*y)[kTrellisMaxDim], TrellisVector* v, uint8_t (*codes)[kTrellisMaxDim],
                             float* cc, float* yc) {
    for (int k = 0; k < n; ++k) switch (t.bits) {
            case 1:
                measure<1>(t, y[k], v + k);
                break;
            case 2:
                measure<2>(t, y[k], v + k);
                break;
            case 3:
                measure<4>(t, y[k], v + k);
                break;
            case 4:
                measure<8>(t, y[k], v + k);
                break;
            case 5:
                measure<16>(t, y[k], v + k);
                break;
        }
    const int d = t.head_dim;
    uint32_t state[n];
    Search<n> search;
    search.start_anywhere();
    search.run(t, v, (d - kTrellisOverlap % d) % d, 2 * kTrellisOverlap);
    search.best(state);
    search.trace(v, kTrellisOverlap, 2 * kTrellisOverlap, state);
    search.start_at(state);
    search.run(t, v, 0, d);
    search.trace(v, 0, d, state);
    for (int k = 0; k < n; ++k) {
        uint8_t* u = v[k].bit + 8;
        memcpy(u - 8, u + d - 8, 8);
        cc[k] = yc[k] = 0;
        for (int i = 0; i < d; ++i) {
            uint32_t z0 = 0, z1 = 0;
#pragma GCC unroll 8
            for (int j = 0; j <= kTrellisMemory; ++j) {
                if (kTrellisH1 >> j & 1) z0 ^= u[i - j];
                if (kTrellisH0 >> j & 1) z1 ^= u[i - j];
            }
            const uint32_t subset = 2 * z1 + z0, point = v[k].point[4 * i + subset];
            const float c = t.trellis_levels[subset][point];
            codes[k][i] = static_cast<uint8_t>(point | u[i] << (t.bits - 1));
            cc[k] += c * c;
            yc[k] += c * y[k][i];
        }
    }
}

}  // namespace
}  // namespace turboquant
