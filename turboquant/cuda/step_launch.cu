#include <cuda_runtime_api.h>

#include "turboquant/cuda/impl/step.h"

namespace turboquant::cuda {
namespace {

__global__ void keep_rows_kernel(const __grid_constant__ KeepRows a) {
    __shared__ float kept[kMaxHeadDim], signed_kept[kMaxHeadDim];
    for (int j = threadIdx.x; j < a.head_dim; j += blockDim.x) {
        const float sign = a.signs ? a.signs[j] : 0;
        kept[j] = kept_value(a, blockIdx.x, blockIdx.y * a.head_dim + j);
        signed_kept[j] = kept[j] * sign;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < a.head_dim; j += blockDim.x) keep_value(a, blockIdx.x, blockIdx.y, j, kept, signed_kept);
}
__global__ void measure_mean_kernel(const __grid_constant__ MeasureMean a) {
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) mean_value(a, blockIdx.x, i);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) a.done[blockIdx.x] = a.number;
}
__global__ void transform_queries_kernel(const __grid_constant__ TransformQueries a) {
    if (blockIdx.z == a.n_terms) {
        for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) scale_query_value(a, blockIdx.x, blockIdx.y, i);
        return;
    }
    for (int i = threadIdx.x; i < a.n_freq; i += blockDim.x) query_term(a, blockIdx.z, blockIdx.x, blockIdx.y, i);
}
__global__ void patch_mask_kernel(const __grid_constant__ PatchMask a) {
    const int cell = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (cell < a.n_kv) patch_value(a, blockIdx.y, cell);
}
__global__ void move_rows_kernel(std::uint16_t* halves, std::size_t n_embd, const std::int64_t* from, const std::int64_t* to) {
    for (std::size_t i = threadIdx.x; i < n_embd; i += blockDim.x) halves[to[blockIdx.x] * n_embd + i] = halves[from[blockIdx.x] * n_embd + i];
}
__global__ void merge_kernel(const __grid_constant__ MergeResults a) {
    for (int i = threadIdx.x; i < a.head_dim; i += blockDim.x) merge_value(a, blockIdx.x, blockIdx.y, i);
}

cudaStream_t of(Stream s) { return static_cast<cudaStream_t>(s); }

}  // namespace

Status keep_rows(const KeepRows& a, Stream stream) {
    if (a.n == 0 || (!a.out && !a.slots)) return {};
    if (a.slots && (!a.halves || !a.tiles != !a.matrix)) return bad_argument("keep_rows: slots without halves, or tiles without matrix");
    keep_rows_kernel<<<dim3(a.n, a.n_head), 128, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "keep_rows");
}

Status measure_mean(const MeasureMean& a, Stream stream) {
    if (a.n <= 0) return bad_argument("measure_mean: no rows");
    measure_mean_kernel<<<a.n_head, 128, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "measure_mean");
}

Status move_rows(std::uint16_t* halves, std::size_t n_embd, const std::int64_t* from, const std::int64_t* to, int n, Stream stream) {
    if (n == 0) return {};
    move_rows_kernel<<<n, 256, 0, of(stream)>>>(halves, n_embd, from, to);
    return status_of(cudaGetLastError(), "move_rows");
}

Status transform_queries(const TransformQueries& a, Stream stream) {
    const int parts = a.n_terms + (a.scales != nullptr);
    if (a.n_tokens == 0 || parts == 0) return {};
    transform_queries_kernel<<<dim3(a.n_seq * a.n_tokens, a.n_head, parts), 64, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "transform_queries");
}

Status patch_mask(const PatchMask& a, Stream stream) {
    if (a.n_tokens == 0 || a.n_kv == 0) return {};
    patch_mask_kernel<<<dim3((a.n_kv + 255) / 256, a.n_tokens), 256, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "patch_mask");
}

Status merge_results(const MergeResults& a, Stream stream) {
    if (a.n_tokens == 0) return {};
    merge_kernel<<<dim3(a.n_tokens, a.n_head), 128, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "merge_results");
}

}  // namespace turboquant::cuda
