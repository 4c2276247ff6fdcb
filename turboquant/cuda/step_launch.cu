#include <cuda_runtime_api.h>

#include "turboquant/attention/attention.h"
#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/impl/kept_pair.h"
#include "turboquant/cuda/impl/launch.h"
#include "turboquant/cuda/impl/params.h"
#include "turboquant/cuda/impl/step.h"
#include "turboquant/cuda/impl/warp.cuh"

namespace turboquant::cuda {
namespace {

/// A head of a row, by one warp that has values lane + 32 i: butterflies instead of a product with the matrix.
template <int n>
__global__ void __launch_bounds__(128) keep_heads_kernel(const __grid_constant__ KeptPair pair) {
    const KeepRows& a = pair.of[blockIdx.z];
    const int at = static_cast<int>(blockIdx.x) * 4 + static_cast<int>(threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (a.signs && lane < 2 * n) touch(a.signs + 32 * lane);  // two rows of them
    if (a.slots && lane == 30 && at < a.n * a.n_head) touch(a.slots + at / a.n_head);
    wait_for_launch_before();
    let_next_begin();  // not sooner: attention beside this reads what was made before it
    if (at < a.n * a.n_head) {
        const int i = at / a.n_head, head = at - i * a.n_head;
        keep_head<n>(a, i, head, lane);
    }
}
__global__ void keep_rows_kernel(const __grid_constant__ KeptPair pair) {
    wait_for_launch_before();
    let_next_begin();
    const KeepRows& a = pair.of[blockIdx.z];
    __shared__ float kept[kMaxHeadDim], signed_kept[kMaxHeadDim];
    for (int j = threadIdx.x; j < a.head_dim; j += blockDim.x) {
        const float sign = a.signs ? a.signs[j] : 0;
        kept[j] = kept_value(a, blockIdx.x, blockIdx.y * a.head_dim + j);
        signed_kept[j] = kept[j] * sign;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < a.head_dim; j += blockDim.x) keep_value(a, blockIdx.x, blockIdx.y, j, kept, signed_kept);
}
const void* keep_kernel(const KeepRows& a) {
    const bool butterflies = !a.tiles || a.signs;
    return butterflies && a.head_dim == 64    ? reinterpret_cast<const void*>(&keep_heads_kernel<2>)
           : butterflies && a.head_dim == 128 ? reinterpret_cast<const void*>(&keep_heads_kernel<4>)
           : butterflies && a.head_dim == 256 ? reinterpret_cast<const void*>(&keep_heads_kernel<8>)
           : butterflies && a.head_dim == 512 ? reinterpret_cast<const void*>(&keep_heads_kernel<16>)
                                              : reinterpret_cast<const void*>(&keep_rows_kernel);
}
/// A tile of a query's mask by each warp.
__global__ void summarize_mask_kernel(const __grid_constant__ MaskTiles a) {
    const int tile = static_cast<int>(blockIdx.x * 8 + (threadIdx.x >> 5)), lane = threadIdx.x & 31, t = blockIdx.y, seq = t / a.n_tokens,
              n_tiles = (a.n_kv + 63) / 64;
    if (tile >= n_tiles) return;
    const std::uint16_t* m = a.mask + seq * a.seq_stride + (t - seq * a.n_tokens) * a.token_stride + tile * 64;
    bool counts = false, shows = false;
    for (int i = lane; i < 64 && tile * 64 + i < a.n_kv; i += 32) counts |= (m[i] & 0x7fff) != 0, shows |= m[i] != kMaskHidden;
    counts = __any_sync(~0u, counts), shows = __any_sync(~0u, shows);
    if (lane == 0) a.out[static_cast<std::size_t>(t) * n_tiles + tile] = static_cast<std::uint8_t>((counts ? kMaskCounts : 0) | (shows ? kMaskShows : 0));
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
__global__ void move_rows_kernel(std::uint16_t* halves, std::size_t n_embd, const std::int64_t* from, const std::int64_t* to) {
    for (std::size_t i = threadIdx.x; i < n_embd; i += blockDim.x) halves[to[blockIdx.x] * n_embd + i] = halves[from[blockIdx.x] * n_embd + i];
}

cudaStream_t of(Stream s) { return static_cast<cudaStream_t>(s); }

}  // namespace

Status keep_rows(const KeepRows& a, Stream stream, const KeepRows* also) {
    if (a.n == 0 || (!a.out && !a.slots && !a.aside_places)) return also ? keep_rows(*also, stream) : Status{};
    if (a.aside_places && !a.aside) return bad_argument("keep_rows: places aside without memory");
    if (a.slots && (!a.halves || !a.tiles != !a.matrix)) return bad_argument("keep_rows: slots without halves, or tiles without matrix");
    const void* kernel = keep_kernel(a);
    if (also && (also->n != a.n || also->n_head != a.n_head || also->head_dim != a.head_dim || keep_kernel(*also) != kernel)) {
        const Status status = keep_rows(a, stream);
        return status.ok() ? keep_rows(*also, stream) : status;
    }
    KeptPair pair{{a, also ? *also : a}};
    void* args[] = {&pair};
    const unsigned n = also ? 2 : 1;
    const dim3 grid = kernel == reinterpret_cast<const void*>(&keep_rows_kernel) ? dim3(a.n, a.n_head, n) : dim3((a.n * a.n_head + 3) / 4, 1, n);
    return launch(kernel, grid, dim3(128), args, 0, stream, true, "keep_rows");
}

Status summarize_mask(const MaskTiles& a, Stream stream) {
    const int n_tiles = (a.n_kv + 63) / 64, rows = a.n_seq * a.n_tokens;
    if (n_tiles == 0 || rows == 0) return {};
    if (!a.mask || !a.out) return bad_argument("summarize_mask: null pointer");
    summarize_mask_kernel<<<dim3((n_tiles + 7) / 8, rows), 256, 0, of(stream)>>>(a);
    return status_of(cudaGetLastError(), "summarize_mask");
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

}  // namespace turboquant::cuda
