// Tables of the score term, and the summary of positions that the kernels steer by.
#include <cmath>

#include "turboquant/codec/tile.h"
#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/impl/term.cuh"

namespace turboquant::cuda {
namespace {

__global__ void summarize(const int32_t* cell_pos, const uint8_t* cell_term, std::size_t cell_stride, int n_kv, const int32_t* seq_n_kv, int32_t* tile_pos,
                          std::size_t tile_stride) {
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x & 31, seq = blockIdx.y;
    const int n = seq_n_kv ? seq_n_kv[seq] : n_kv, first = warp * kTileKeys;
    if (first >= n_kv) return;
    const int32_t* pos = cell_pos + seq * cell_stride;
    const uint8_t* term = cell_term ? cell_term + seq * cell_stride : nullptr;
    const int p0 = first < n ? pos[first] : -1, t0 = term && first < n ? term[first] : 0;
    bool good = p0 >= 0 && p0 >> kTileTermBit == 0;
    for (int i = lane; i < kTileKeys; i += 32)
        if (first + i < n) good &= pos[first + i] == p0 + i && (!term || term[first + i] == t0);
    good = __all_sync(~0u, good);
    if (lane == 0) tile_pos[seq * tile_stride + warp] = good ? p0 | t0 << kTileTermBit : -1;
}

}  // namespace

std::vector<float> make_term_turns(std::span<const double> frequencies, int max_position) {
    const int n = static_cast<int>(frequencies.size()), pad = term_pad(n), rows = kTurnRows + max_position / kTileKeys + 1;
    std::vector<float> turns(static_cast<std::size_t>(rows) * pad * 2, 0.f);
    for (int r = 0; r < rows; ++r) {
        const double position = r < 64 ? r : r == 64 ? 63.5 : 64. * (r - kTurnRows);
        for (int i = 0; i < n; ++i) {
            turns[(static_cast<std::size_t>(r) * pad + i) * 2] = static_cast<float>(std::cos(position * frequencies[i]));
            turns[(static_cast<std::size_t>(r) * pad + i) * 2 + 1] = static_cast<float>(std::sin(position * frequencies[i]));
        }
    }
    return turns;
}

std::vector<std::uint32_t> make_term_panel(std::span<const double> frequencies) {
    const int n = static_cast<int>(frequencies.size()), steps = term_pad(n) / 16;
    std::vector<std::uint32_t> panel;
    for (int step = 0; step < steps; ++step)
        for (int part = 0; part < 2; ++part)
            for (int trig = 0; trig < 2; ++trig)
                for (int rows = 0; rows < 4; ++rows)
                    for (int lane = 0; lane < 32; ++lane)
                        for (int reg = 0; reg < 4; ++reg) {
                            const int i = 2 * rows + (reg & 1), g = lane / 4, m = i < 4 ? 8 * i + 7 - g : 8 * i + g;
                            std::uint32_t word = 0;
                            for (int k = 0; k < 2; ++k) {
                                const int f = 16 * step + 4 * (lane % 4) + 2 * (reg >> 1) + k;
                                if (f >= n) continue;
                                const double angle = (m + .5) * frequencies[static_cast<std::size_t>(f)];
                                const double x = trig ? std::sin(angle) : std::cos(angle);
                                const __half hi = __float2half_rn(static_cast<float>(x));
                                const __half h = part ? __float2half_rn(static_cast<float>(x - static_cast<double>(__half2float(hi)))) : hi;
                                word |= static_cast<std::uint32_t>(__half_as_ushort(h)) << 16 * k;
                            }
                            panel.push_back(word);
                        }
    const std::size_t size = panel.size();
    panel.resize(kPanelCopies * size);
    for (std::size_t i = size; i < panel.size(); ++i) panel[i] = panel[i - size];
    return panel;
}

Status summarize_positions(const Term& term, int n_seq, int n_kv, const std::int32_t* seq_n_kv, std::int32_t* tile_pos, Stream stream) {
    if (!term.cell_pos || !tile_pos) return bad_argument("positions: null pointer");
    if (n_seq <= 0 || n_kv <= 0) return {};
    const int tiles = (n_kv + kTileKeys - 1) / kTileKeys;
    summarize<<<dim3((tiles + 3) / 4, n_seq), 128, 0, static_cast<cudaStream_t>(stream)>>>(term.cell_pos, term.cell_term, term.cell_seq_stride, n_kv, seq_n_kv,
                                                                                           tile_pos, term.tile_seq_stride);
    return status_of(cudaGetLastError(), "positions: launch");
}

}  // namespace turboquant::cuda
