// What a block makes of its queries before its first tile: operands of the key format, coefficients of the score term.
#pragma once

#include "turboquant/cuda/impl/block.cuh"
#include "turboquant/cuda/impl/bulk_copy.cuh"
#include "turboquant/cuda/impl/rotate.cuh"
#include "turboquant/cuda/impl/term.cuh"

namespace turboquant::cuda {

template <int D, int kGroups>
struct Queries : Block<D, kGroups> {
    using Base = Block<D, kGroups>;
    using Base::p, Base::shared, Base::thread, Base::warp, Base::lane, Base::g, Base::t, Base::n, Base::kRows;
    using Base::item, Base::item_index, Base::kv_head, Base::row_block, Base::first_row, Base::n_kv, Base::exact, Base::tile_begin, Base::tile_end;
    __device__ __forceinline__ explicit Queries(const Base& block) : Base(block) {}

    /// Rotated queries and their largest magnitudes, after between(), whose loads and the queries' are thus under way together.
    template <class Between>
    __device__ __forceinline__ void make_rows(const SharedLayout& l, Between&& between) {
        float* rows = reinterpret_cast<float*>(shared + l.rows);
        float* top = reinterpret_cast<float*>(shared + l.row_top);
        const float* q = (exact && p.exact_q ? p.exact_q : p.q) + item.seq * p.q_seq_stride;
        const bool rotate_q = this->is_rotated(p.k);
        constexpr int kEach = kRows / kWarps;
        const auto row_at = [&](int r) {
            const int row = first_row + r, token = row / p.group;
            return q + token * p.q_token_stride + (kv_head * p.group + row - token * p.group) * p.q_head_stride;
        };
        if constexpr ((D & (D - 1)) == 0) {
            float v[kEach][D / 32];
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                const int r = warp + kWarps * j;
                const float* from = row_at(r);
#pragma unroll
                for (int i = 0; i < D / 32; ++i) v[j][i] = first_row + r < p.n_rows ? from[lane + 32 * i] : 0;
            }
            between();
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                if (rotate_q) rotate_lanes<D>(v[j], lane, p.signs_in, p.signs_out);
                float most = 0, *x = rows + (warp + kWarps * j) * D;
#pragma unroll
                for (int i = 0; i < D / 32; ++i) x[lane + 32 * i] = v[j][i], most = fmaxf(most, fabsf(v[j][i]));
                put_top(top + warp + kWarps * j, most);
            }
        } else {
            between();
#pragma unroll 1
            for (int r = warp; r < kRows; r += kWarps) {
                float most = 0, *x = rows + r * D;
                const float* from = row_at(r);
                for (int i = lane; i < D; i += 32) x[i] = first_row + r < p.n_rows ? from[i] : 0;
                if (rotate_q) rotate_row<D>(x, lane, p.signs_in, p.signs_out, p.hartley);
                for (int i = lane; i < D; i += 32) most = fmaxf(most, fabsf(x[i]));
                put_top(top + r, most);
            }
        }
    }

    /// Operands of the key format, of the rows that all warps made.
    __device__ __forceinline__ void make_operands(const SharedLayout& l, int format) {
        const float* rows = reinterpret_cast<const float*>(shared + l.rows);
        const float* top = reinterpret_cast<const float*>(shared + l.row_top);
        uint32_t* operands = reinterpret_cast<uint32_t*>(shared + l.operands);
        const bool raw = format_is_raw(format), trellis = format_is_trellis(format);
#pragma unroll 1
        for (int i = thread; i < kGroups * (raw ? 2 : 1) * n * 32; i += 32 * kWarps) {
            const int to = i & 31, reg = i / 32 % (raw ? 2 * n : n), group = i / 32 / (raw ? 2 * n : n), column = to >> 2, r = 4 * group + (column >> 1);
            const float* x = rows + r * D + (to & 3) * 4 * n;
            const float most = top[r], f = most > 0 ? (raw ? 1 : kQueryTop) / most : 0;
            uint32_t word = 0;
            if (raw) {
                const float a = x[2 * reg] * f, b = x[2 * reg + 1] * f;
                const __half2 hi = __floats2half2_rn(a, b);
                const float2 back = __half22float2(hi);
                word = bits_of(column & 1 ? __floats2half2_rn(a - back.x, b - back.y) : hi);
            } else {
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    const int v = __float2int_rn(x[trellis ? reg + n * b : 4 * reg + b] * f), lo = static_cast<int8_t>(v), hi = (v - lo) >> 8;
                    word |= static_cast<uint32_t>((column & 1 ? lo : hi) & 255) << 8 * b;
                }
            }
            operands[(group * 2 * n + reg) * 32 + to] = word;
        }
    }

    /// The panel of the score term on its way to shared memory, and its arrival; a barrier of the block must lie between the two.
    __device__ __forceinline__ void fetch_panel(const SharedLayout& l) const {
        if (!has_panel()) return;
        const uint4* from = p.term.panel + blockIdx.x % kPanelCopies * (32u * p.term.n_pad);
#if __CUDA_ARCH__ >= 900
        if (thread == 0) {  // other loads do not stand in line behind it
            auto* arrived = reinterpret_cast<uint64_t*>(shared + l.arrived);
            barrier_init(arrived, 1);
            barriers_ready();
            barrier_expect(arrived, 512 * p.term.n_pad);
            copy_bulk(shared + l.panel, from, 512 * p.term.n_pad, arrived);
        }
#else
        uint4* panel = reinterpret_cast<uint4*>(shared + l.panel);
#pragma unroll 4
        for (int i = thread; i < 32 * p.term.n_pad; i += 32 * kWarps) copy_async(panel + i, from + i);
#endif
    }
    __device__ __forceinline__ void wait_for_panel(const SharedLayout& l) const {
        if (!has_panel()) return;
#if __CUDA_ARCH__ >= 900
        barrier_wait(reinterpret_cast<uint64_t*>(shared + l.arrived), 0);
#else
        wait_for_copies();
#endif
    }

    /// Brings near what make_term reads beside queries.
    __device__ __forceinline__ void touch_term(int p0, int id) const {
        const TermParams& term = p.term;
        if (!has_panel()) return;
        const int lines = term.n_pad / 16, residue = p0 >= 0 ? p0 & 63 : 0;  // of 128 bytes
        for (int i = lane; i < 2 * lines; i += 32) touch(term.turns + (i < lines ? residue : 64) * term.n_pad + i % lines * 16);
        if (!term.mu) return;
        const float* mu = term.mu + __shfl_sync(~0u, id, 0) * term.mu_stride + 2 * D * kv_head;
        for (int i = lane * 32; i < 2 * D; i += 32 * 32) touch(mu + i);
    }
    /// Coefficients of the score term, turned to the middle of two tiles of which the first begins at p0 % 64. Returns that, -1 if
    /// successive_terms serves no tile. `id`: lane k's, the offset of term k, where the kernel makes coefficients.
    __device__ __forceinline__ int make_term(const SharedLayout& l, int p0, int id) {
        const TermParams& term = p.term;
        if (!has_panel()) return -1;
        const int residue = p0 >= 0 ? p0 & 63 : 0;
        float2* ab = reinterpret_cast<float2*>(shared + l.ab);
        const float scale = p.scale * kLog2e;
#pragma unroll 1
        for (int r = warp; r < term.n_terms * kRows; r += kWarps) {
            const int row = first_row + r % kRows;
            const int id_of = __shfl_sync(~0u, id, r / kRows);
#pragma unroll 2
            for (int f = lane; f < term.n_pad; f += 32) {
                const bool there = f < term.n_freq && row < p.n_rows;
                float2 x = there ? term_coefficients<D>(p, item.seq, r / kRows, id_of, row, kv_head, f) : make_float2(0, 0);
                x.x *= scale, x.y *= scale;
                ab[r * term_row_stride(term.n_pad) + f] =
                    counted_from(counted_from(x, __ldg(term.turns + residue * term.n_pad + f)), __ldg(term.turns + (kTurnRows - 1) * term.n_pad + f));
            }
        }
        return residue;
    }

  private:
    __device__ __forceinline__ bool has_panel() const { return p.term.panel && tile_begin < tile_end; }
    /// Largest of a warp's magnitudes.
    __device__ __forceinline__ void put_top(float* to, float most) const {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, d));
        if (lane == 0) *to = most;
    }
};

}  // namespace turboquant::cuda
