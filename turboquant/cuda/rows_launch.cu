#include "turboquant/cuda/rows.h"

#include <cuda_runtime_api.h>

#include "turboquant/attention/turns.h"
#include "turboquant/cuda/impl/rows.h"

namespace turboquant::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(32 * kWarps) get_rows_kernel(const __grid_constant__ EncodePlan plan, const std::int64_t* cells, int n,
                                                               std::uint8_t* rows, std::size_t row_stride) {
    const int i = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
    if (i < n) get_row(plan, cells[i], static_cast<int>(blockIdx.y), threadIdx.x % 32, rows + i * row_stride);
}

__global__ void __launch_bounds__(32 * kWarps) set_rows_kernel(const __grid_constant__ EncodePlan plan, const std::int64_t* cells, int n,
                                                               const std::uint8_t* rows, std::size_t row_stride) {
    const int i = static_cast<int>(blockIdx.x * kWarps + threadIdx.x / 32);
    if (i < n) set_row(plan, cells[i], static_cast<int>(blockIdx.y), threadIdx.x % 32, rows + i * row_stride);
}

__global__ void __launch_bounds__(32 * kWarps) decode_kernel(const __grid_constant__ EncodePlan plan, const __grid_constant__ DecodeArgs args) {
    __shared__ float x[kWarps][kMaxHeadDim];
    __shared__ std::uint8_t codes[kWarps][kMaxHeadDim];
    const int warp = static_cast<int>(threadIdx.x / 32), i = static_cast<int>(blockIdx.x) * kWarps + warp;
    if (i < args.n) decode_row(plan, args, i, static_cast<int>(blockIdx.y), threadIdx.x % 32, x[warp], codes[warp]);
}

__global__ void spread_turns_kernel(const float* digits, int width, const RopeLayout rope, int head_dim, const std::int32_t* positions,
                                    float* out) {
    const int i = static_cast<int>(blockIdx.x);
    for (int d = static_cast<int>(threadIdx.x); d < head_dim; d += static_cast<int>(blockDim.x))
        spread_turn_value(digits, width, rope, head_dim, positions[i], d, out + static_cast<std::size_t>(i) * 2 * head_dim);
}

dim3 grid(int n, int heads) { return dim3((n + kWarps - 1) / kWarps, heads); }
cudaStream_t of(Stream s) { return static_cast<cudaStream_t>(s); }

}  // namespace

Status get_rows(const EncodePlan& plan, const std::int64_t* cells, int n, std::uint8_t* rows, std::size_t row_stride, Stream stream) {
    if (n == 0) return {};
    if (n < 0 || !cells || !rows || row_stride < plan.row_bytes) return bad_argument("get_rows: n, cells, rows or a row_stride of plan.row_bytes");
    get_rows_kernel<<<grid(n, plan.n_head), 32 * kWarps, 0, of(stream)>>>(plan, cells, n, rows, row_stride);
    return status_of(cudaGetLastError(), "get_rows");
}

Status set_rows(const EncodePlan& plan, const std::int64_t* cells, int n, const std::uint8_t* rows, std::size_t row_stride, Stream stream) {
    if (n == 0) return {};
    if (n < 0 || !cells || !rows || row_stride < plan.row_bytes) return bad_argument("set_rows: n, cells, rows or a row_stride of plan.row_bytes");
    set_rows_kernel<<<grid(n, plan.n_head), 32 * kWarps, 0, of(stream)>>>(plan, cells, n, rows, row_stride);
    return status_of(cudaGetLastError(), "set_rows");
}

Status decode_rows(const EncodePlan& plan, const DecodeArgs& args, Stream stream) {
    if (args.n == 0) return {};
    if (args.n < 0 || !args.cells || !args.out) return bad_argument("decode_rows: n, cells or out is not given");
    if (args.turns && (!args.offsets || !args.offset_ids)) return bad_argument("decode_rows: turns without offsets");
    decode_kernel<<<grid(args.n, plan.n_head), 32 * kWarps, 0, of(stream)>>>(plan, args);
    return status_of(cudaGetLastError(), "decode_rows");
}

Status spread_turns(const float* digits, int n_freq, const RopeLayout& rope, int head_dim, const std::int32_t* positions, int n, float* out,
                    Stream stream) {
    if (n == 0) return {};
    if (n < 0 || !digits || !positions || !out) return bad_argument("spread_turns: n, digits, positions or out is not given");
    if (rope.n_dims % 2 || rope.n_offset < 0 || rope.n_offset + rope.n_dims > head_dim || rope.n_dims / 2 > n_freq)
        return bad_argument("spread_turns: RoPE's dims must lie in the head, one frequency a pair");
    spread_turns_kernel<<<n, 128, 0, of(stream)>>>(digits, turn_width(n_freq), rope, head_dim, positions, out);
    return status_of(cudaGetLastError(), "spread_turns");
}

Status copy_tiles(void* dst, const void* src, std::size_t bytes, Stream stream) {
    return status_of(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, of(stream)), "cudaMemcpyAsync");
}

Status clear_tiles(void* tiles, std::size_t bytes, Stream stream) { return status_of(cudaMemsetAsync(tiles, 0, bytes, of(stream)), "cudaMemsetAsync"); }

}  // namespace turboquant::cuda
