// The two matrix products of attention, for int8 and for float panels, register-blocked: rows x vectors of columns stay in registers while
// the depth runs. A is row-major; the panel is [depth/4][columns][4] bytes or [depth][columns] floats.
// All loops over the block must be unrolled, the short ones at its ends too: else GCC keeps the accumulators in memory,
// and prefill takes 111 instead of 82 ms.
#pragma once

namespace turboquant {
namespace {

// scores[r][c] = sum_k query[r][k] * panel[k][c], 64 columns. A *block* is R rows x V vectors.
struct KeyProductI8 {
    const int8_t* query;
    int depth;
    const uint8_t* panel;
    int32_t* scores;

    template <int R, int V>
    void block(int row, int column) const {
        Simd::I acc[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[r][v] = Simd::zero_ints();
        const uint8_t* q = reinterpret_cast<const uint8_t*>(query) + static_cast<size_t>(row) * depth;
        const uint8_t* p = panel + 4 * column;
        for (int k = 0; k < depth; k += 4, p += 4 * kTileKeys) {
            Simd::B b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = Simd::load_bytes(p + v * Simd::kBytes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Simd::B a = Simd::splat_dword(q + static_cast<size_t>(r) * depth + k);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[r][v] = Simd::dot_key(acc[r][v], b[v], a);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) Simd::store_ints(scores + (row + r) * kTileKeys + column + v * Simd::kFloats, acc[r][v]);
    }
};

// out[r][c] = alpha[r]*out[r][c] + step[r] * sum_j weights[r][j] * panel[j][c], j < 64; or j < depth, a multiple of 4.
template <bool kWholeTile = true>
struct ValueProductI8 {
    const uint8_t* weights;
    const uint8_t* panel;
    int columns;
    const float *alpha, *step;
    float* out;
    int depth = kTileKeys;

    template <int R, int V>
    void block(int row, int column) const {
        const int n = kWholeTile ? kTileKeys : depth;
        Simd::I acc[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[r][v] = Simd::zero_ints();
        const uint8_t *w = weights + row * kTileKeys, *p = panel + 4 * column;
        for (int k = 0; k < n; k += 4, p += 4 * static_cast<size_t>(columns)) {
            Simd::B b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = Simd::load_bytes(p + v * Simd::kBytes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Simd::B a = Simd::splat_dword(w + r * kTileKeys + k);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[r][v] = Simd::dot_value(acc[r][v], a, b[v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const Simd::F al = Simd::splat(alpha[row + r]), st = Simd::splat(step[row + r]);
            float* o = out + static_cast<size_t>(row + r) * columns + column;
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v, o += Simd::kFloats)
                Simd::store(o, Simd::fma(Simd::to_floats(acc[r][v]), st, Simd::mul(al, Simd::load(o))));
        }
    }
};

// out[r][c] = alpha[r]*out[r][c] + sum_k a[r][k] * panel[k][c]; alpha null: 0.
struct ProductF32 {
    const float* a;
    int depth;
    const float* panel;
    int columns;
    const float* alpha;
    float* out;

    template <int R, int V>
    void block(int row, int column) const {
        Simd::F acc[R][V];
        float* o = out + static_cast<size_t>(row) * columns + column;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v)
                acc[r][v] =
                    alpha ? Simd::mul(Simd::splat(alpha[row + r]), Simd::load(o + static_cast<size_t>(r) * columns + v * Simd::kFloats))
                          : Simd::splat(0);
        const float *q = a + static_cast<size_t>(row) * depth, *p = panel + column;
        for (int k = 0; k < depth; ++k, p += columns) {
            Simd::F b[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) b[v] = Simd::load(p + v * Simd::kFloats);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Simd::F x = Simd::splat(q[static_cast<size_t>(r) * depth + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; ++v) acc[r][v] = Simd::fma(x, b[v], acc[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) Simd::store(o + static_cast<size_t>(r) * columns + v * Simd::kFloats, acc[r][v]);
    }
};

template <int R, class Product>
inline void row_block(const Product& p, int row, int columns) {
    constexpr int V = Simd::kMaxVecs;
    int c = 0;
    for (; c + V * Simd::kFloats <= columns; c += V * Simd::kFloats) p.template block<R, V>(row, c);
    if constexpr (V > 2)
        for (; c + 2 * Simd::kFloats <= columns; c += 2 * Simd::kFloats) p.template block<R, 2>(row, c);
    for (; c < columns; c += Simd::kFloats) p.template block<R, 1>(row, c);
}

// All of a product: row blocks of nearly equal height, at most kMaxRows.
template <class Product>
inline void multiply(const Product& p, int rows, int columns) {
    int n_blocks = (rows + Simd::kMaxRows - 1) / Simd::kMaxRows;
    for (int row = 0; row < rows; --n_blocks) {
        const int r = (rows - row + n_blocks - 1) / n_blocks;
        switch (r) {
            case 1:
                row_block<1>(p, row, columns);
                break;
            case 2:
                row_block<2>(p, row, columns);
                break;
            case 3:
                row_block<3>(p, row, columns);
                break;
            case 4:
                row_block<4>(p, row, columns);
                break;
            case 5:
                row_block<5>(p, row, columns);
                break;
            default:
                row_block<6>(p, row, columns);
                break;
        }
        row += r;
    }
}
static_assert(Simd::kMaxRows <= 6);

}  // namespace
}  // namespace turboquant
