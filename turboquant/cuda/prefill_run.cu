// Launches prefill: operands, attention, and what remains per row.
#include "turboquant/cuda/prefill.h"

#include "turboquant/cuda/impl/prefill_exact.cuh"
#include "turboquant/cuda/impl/prefill_operands.cuh"

namespace turboquant::cuda {
namespace {

struct Steps {
    const void *panels, *queries, *finish, *exact;
};
template <int D>
Steps steps(bool wide) {
    return {wide ? reinterpret_cast<const void*>(&make_panels<D, true>) : reinterpret_cast<const void*>(&make_panels<D, false>), reinterpret_cast<const void*>(&make_queries<D>), reinterpret_cast<const void*>(&finish_rows<D>), reinterpret_cast<const void*>(&exact_part<D>)};
}
Steps steps_of(int head_dim, bool wide) {
    switch (head_dim) {
        case 64:
            return steps<64>(wide);
        case 80:
            return steps<80>(wide);
        case 96:
            return steps<96>(wide);
        case 112:
            return steps<112>(wide);
        default:
            return steps<128>(wide);
    }
}

}  // namespace

Status run_prefill(const AttentionPlan& plan, const AttentionParams& a, void* workspace, Stream stream) {
    const AttentionPlan::Prefill& f = plan.prefill;
    const Steps kernels = steps_of(plan.head_dim, f.wide);
    const void* attend = prefill_instance(plan.head_dim, a.mask || a.softcap != 0, f.wide);
    auto* base = static_cast<std::uint8_t*>(workspace);
    PrefillParams p{};
    p.a = a;
    p.panels = base + f.panels, p.n_panels = f.n_panels;
    p.queries = base + f.queries, p.units = reinterpret_cast<float*>(base + f.units), p.n_groups = f.n_groups;
    p.n_splits = f.n_splits, p.n_parts = f.n_splits + plan.exact_windows, p.part = reinterpret_cast<float*>(base + f.part), p.part_ml = reinterpret_cast<float2*>(base + f.part_ml);
    void* args[] = {&p};
    const auto s = static_cast<cudaStream_t>(stream);
    const unsigned heads = plan.n_head_kv, seqs = plan.n_seq, rows = f.n_groups * kGroupRows;
    const int panel_memory = panel_layout(plan.head_dim, f.wide).bytes + (2 * 256 + panel_warps(f.wide) * plan.head_dim) * 4, memory = prefill_shared(f.wide).bytes,
              exact_memory = exact_shared(plan.head_dim).bytes;
    if (const auto e = cudaFuncSetAttribute(kernels.panels, cudaFuncAttributeMaxDynamicSharedMemorySize, panel_memory))
        return status_of(e, "prefill panels: shared memory");
    if (const auto e = cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, memory)) return status_of(e, "prefill: shared memory");
    if (plan.exact_windows) {
        if (const auto e = cudaFuncSetAttribute(kernels.exact, cudaFuncAttributeMaxDynamicSharedMemorySize, exact_memory))
            return status_of(e, "prefill of exact rows: shared memory");
        const dim3 grid((a.n_rows + kExactRows - 1) / kExactRows, heads, seqs);
        if (const auto e = cudaLaunchKernel(kernels.exact, grid, dim3(32 * kExactWarps), args, exact_memory, s)) return status_of(e, "prefill of exact rows: launch");
    }
    if (f.n_panels > 0)
        if (const auto e = cudaLaunchKernel(kernels.panels, dim3(f.n_panels, heads, seqs), dim3(32 * panel_warps(f.wide)), args, panel_memory, s)) return status_of(e, "prefill panels: launch");
    if (const auto e = cudaLaunchKernel(kernels.queries, dim3(rows / 8, heads, seqs), dim3(256), args, 0, s)) return status_of(e, "prefill queries: launch");
    if (const auto e = cudaLaunchKernel(attend, dim3(rows / kPrefillRows, heads, seqs * f.n_splits), dim3(kPrefillThreads), args, memory, s))
        return status_of(e, "prefill: launch");
    return status_of(cudaLaunchKernel(kernels.finish, dim3(rows / 8, heads, seqs), dim3(256), args, 0, s), "prefill rows: launch");
}

}  // namespace turboquant::cuda
