// Which calls prefill takes, and how it cuts them.
#include <algorithm>

#include "turboquant/cuda/impl/prefill_params.h"
#include "turboquant/cuda/impl/shared_layout.h"
#include "turboquant/cuda/prefill.h"

namespace turboquant::cuda {
namespace {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int kMaxPrefillSplits = 32;

bool bytes_hold(CodecId id) {
    return fragment_codec_index(id) >= 0 && id != CodecId::raw && id != CodecId::turbo5 && id != CodecId::turbo6 && id != CodecId::turbo8;
}

/// Whether it is faster than the decode kernels: they look codes up again for every eight query rows, but need no panels.
bool prefill_pays(const AttentionShape& s) {
    // Of a KV head: where both take as long (docs/cuda.md, Drafts), by the kernels that know their format. Those of any format are slower.
    constexpr int kMostDecodeRows = 56, kMostWithTerm = 80;
    const bool one_format = std::all_of(s.formats.begin(), s.formats.end(), [&](CodecId id) { return id == s.formats[0]; });
    if (!one_format || !has_own_kernels(s.head_dim, fragment_codec_index(s.formats[0]))) return true;
    return s.n_tokens * (s.n_head / s.n_head_kv) > (s.term ? kMostWithTerm : kMostDecodeRows);
}

}  // namespace

bool prefill_can(const Device& device, const AttentionShape& s) {
    const bool sizes = s.head_dim == 64 || s.head_dim == 80 || s.head_dim == 96 || s.head_dim == 112 || s.head_dim == 128;
    return device.compute_capability == 90 && sizes && s.n_tokens > 8 && !s.formats.empty() &&
           std::all_of(s.formats.begin(), s.formats.end(), bytes_hold);
}

bool takes_prefill(const Device& device, const AttentionShape& s) { return prefill_can(device, s) && prefill_pays(s); }

void plan_prefill(const Device& device, AttentionPlan& plan, bool wide) {
    AttentionPlan::Prefill f;
    f.wide = wide;
    const int blocks = ceil_div(plan.n_tokens * (plan.n_head / plan.n_head_kv), kPrefillRows), heads = plan.n_head_kv * plan.n_seq;
    f.n_groups = kPrefillGroups * blocks, f.n_panels = ceil_div(plan.n_kv, kPanelKeys);
    // Whole waves of one block per multiprocessor, each as long as its part; parts of all rows are written and read once more.
    double best = 1e300;
    for (int splits = 1; splits <= std::min(kMaxPrefillSplits, std::max(1, f.n_panels / 4)); ++splits) {
        const double waves = ceil_div(blocks * heads * splits, device.n_sm);
        const double time = waves * (ceil_div(f.n_panels, splits) + 3) + 0.02 * splits * blocks * heads / 8;
        if (time < best * 0.98) best = time, f.n_splits = splits;
    }
    std::size_t at = (plan.workspace_bytes + 255) / 256 * 256;
    const auto take = [&at](std::size_t bytes) {
        const std::size_t from = at;
        at += (bytes + 255) / 256 * 256;
        return from;
    };
    const int n_parts = f.n_splits + plan.exact_windows;
    const std::size_t units = static_cast<std::size_t>(heads), rows = static_cast<std::size_t>(f.n_groups) * kGroupRows;
    f.panels = take(units * f.n_panels * panel_layout(plan.head_dim, wide).bytes);
    f.queries = take(units * f.n_groups * 2 * kQueryPlane);
    f.units = take(units * rows * sizeof(float));
    f.part = take(units * n_parts * rows * plan.head_dim * sizeof(float));
    f.part_ml = take(units * n_parts * rows * 2 * sizeof(float));
    plan.prefill = f, plan.workspace_bytes = at;
}

bool prefill_serves(const AttentionPlan& plan, const AttentionArgs& a) {
    if (!plan.prefill.n_splits) return false;
    if (plan.exact_windows && (!a.exact_mask || !a.exact_mask_tiles || a.exact_tiles > kMostExactTiles)) return false;
    if (a.term.n_freq > 0 && !(plan.prefill.wide && a.term.offset && a.term.dim_freq)) return false;
    return (a.k.head_format || bytes_hold(a.k.codec)) && (a.v.head_format || bytes_hold(a.v.codec));
}

}  // namespace turboquant::cuda
