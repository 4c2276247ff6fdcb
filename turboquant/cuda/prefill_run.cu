// Launches prefill: operands, attention, and what remains per row.
#include "turboquant/cuda/prefill.h"

#include "turboquant/cuda/impl/launch.h"
#include "turboquant/cuda/impl/prefill_exact.cuh"
#include "turboquant/cuda/impl/prefill_operands.cuh"
#include "turboquant/cuda/impl/prefill_rows.cuh"
#include "turboquant/cuda/memory.h"

namespace turboquant::cuda {
namespace {

struct Steps {
    const void *panels, *queries, *finish, *exact;
    int panel_memory;
};
template <int D>
Steps steps(bool wide) {
    return {wide ? reinterpret_cast<const void*>(&make_panels<D, true>) : reinterpret_cast<const void*>(&make_panels<D, false>),
            reinterpret_cast<const void*>(&make_queries<D>),
            reinterpret_cast<const void*>(&finish_rows<D>),
            reinterpret_cast<const void*>(&exact_part<D>),
            panel_layout(D, wide).bytes + 2 * 256 * 4 + (wide ? WideKeys<D>::kBytes : 0)};
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

Status run_prefill(const AttentionPlan& plan, const AttentionParams& a, void* codes_ready, void* workspace, Stream stream) {
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
    const unsigned heads = plan.n_head_kv, seqs = plan.n_seq, rows = f.n_groups * kGroupRows;
    const dim3 by_rows(rows / kRowsOfBlock, heads, seqs);
    Status status;
    const auto launch = [&](const void* kernel, dim3 grid, int threads, int memory, const char* what) {
        if (!status.ok()) return;
        if (memory) status = allow_shared(kernel, memory, what);
        if (status.ok()) status = status_of(cudaLaunchKernel(kernel, grid, dim3(threads), args, memory, static_cast<cudaStream_t>(stream)), what);
    };
    if (plan.exact_windows)
        launch(kernels.exact, dim3((a.n_rows + kExactRows - 1) / kExactRows, heads, seqs), 32 * kExactWarps, exact_shared(plan.head_dim).bytes, "prefill of exact rows: launch");
    launch(kernels.queries, by_rows, 32 * kRowsOfBlock, 0, "prefill queries: launch");
    if (status.ok() && codes_ready) status = wait_for(stream, codes_ready);
    if (f.n_panels > 0) launch(kernels.panels, dim3(f.n_panels, heads, seqs), 32 * panel_warps(f.wide), kernels.panel_memory, "prefill panels: launch");
    launch(attend, dim3(rows / kPrefillRows, heads, seqs * f.n_splits), kPrefillThreads, prefill_shared(f.wide).bytes, "prefill: launch");
    launch(kernels.finish, by_rows, 32 * kRowsOfBlock, 0, "prefill rows: launch");
    return status;
}

}  // namespace turboquant::cuda
