// How an attention call is cut: row blocks, and parts of each sequence.
#include <algorithm>
#include <string>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/impl/shared_layout.h"
#include "turboquant/cuda/prefill.h"
#include "turboquant/cuda/workspace.h"

namespace turboquant::cuda {
namespace {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int kShortPart = 32;   // tiles
constexpr int kMaxSplits = 127;  // with exact rows a part for each lane of a block (impl/join.cuh)

// Parts of a sequence of n_tiles, if a part has about `per_part`: none is without work for a warp.
int parts_of(int n_tiles, int per_part) { return std::clamp(ceil_div(n_tiles, per_part), 1, kMaxSplits); }

// Multiprocessors, and blocks that one has at a time.
struct Occupancy {
    int n_sm, resident;
};

// Tiles per part such that the busiest multiprocessor takes the least time, in units of tiles at its full speed. It gets its share of the
// blocks, so many at a time; one alone is slow, as loads are not hidden. Each block costs some time of its own, each part some of the merge;
// where blocks are short they begin all at once, so that nothing hides the start of those that follow.
// With a score term a warp takes pairs of tiles, unless a block has few.
int choose_part(const std::vector<int>& tiles, int heads, Occupancy o, bool term) {
    const int longest = *std::max_element(tiles.begin(), tiles.end());
    double best_time = 1e300;
    int best = longest;
    for (int parts = 1; parts <= std::min(kMaxSplits, std::max(1, ceil_div(longest, kWarps))); ++parts) {
        const int per_part = ceil_div(longest, parts);
        long blocks = 0;
        for (const int n : tiles) blocks += static_cast<long>(parts_of(n, per_part)) * heads;
        const int grain = term && per_part > kWarps ? 2 * kWarps : kWarps;
        const long of_sm = (blocks + o.n_sm - 1) / o.n_sm, rounds = (of_sm + o.resident - 1) / o.resident,
                   last = of_sm - (rounds - 1) * o.resident;
        const double slowness = last == 1 ? 1.6 : last == 2 ? 1.03 : 1;
        const double work = static_cast<double>(of_sm - last) + static_cast<double>(last) * slowness;
        const double start = per_part < kShortPart ? 20 : 4;
        const double time =
            work * ceil_div(per_part, grain) * grain + 4 + start * static_cast<double>(rounds - 1) + (parts > 1 ? 6 + 0.2 * parts : 0);
        if (time < best_time * 0.995) best_time = time, best = per_part;
    }
    return best;
}

}  // namespace

WorkspaceLayout workspace_layout(const AttentionPlan& plan) {
    WorkspaceLayout w{};
    const std::size_t units = static_cast<std::size_t>(plan.n_head_kv) * plan.n_row_blocks,
                      rows = 4 * static_cast<std::size_t>(plan.groups);
    std::size_t at = 0;
    const auto take = [&at](std::size_t bytes) {
        const std::size_t from = at;
        at += (bytes + 255) / 256 * 256;
        return from;
    };
    w.count = take(plan.n_seq * units * sizeof(unsigned));
    w.items = take(plan.items.size() * sizeof(AttentionPlan::Item));
    const std::size_t slots = plan.most_splits > 1 ? plan.n_items * units : 0;
    w.part_ml = take(slots * rows * 2 * sizeof(float));
    w.part = take(slots * rows * plan.head_dim * sizeof(float));
    w.bytes = at;
    return w;
}

Status plan_attention(const Device& device, const AttentionShape& s, AttentionPlan& plan) {
    if (device.compute_capability < 80) return bad_argument("attention: the GPU is older than sm_80 (Ampere)");
    if (!attention_serves(s.head_dim)) {
        static const std::string text = "attention: head sizes with CUDA kernels are " + supported_head_dims(kMostAttentionHeadDim) +
                                        "; run others (576: MLA, values within keys) on the CPU";
        return bad_argument(text.c_str());
    }
    if (s.n_head <= 0 || s.n_head_kv <= 0 || s.n_head % s.n_head_kv)
        return bad_argument("attention: the number of query heads is not a multiple of the number of KV heads");
    if (s.n_tokens <= 0 || s.n_kv.empty()) return bad_argument("attention: no query tokens or no sequences");
    for (const int n : s.n_kv)
        if (n < 0) return bad_argument("attention: a sequence of negative length");

    AttentionPlan p;
    p.head_dim = s.head_dim, p.n_head = s.n_head, p.n_head_kv = s.n_head_kv, p.n_tokens = s.n_tokens;
    p.n_seq = static_cast<int>(s.n_kv.size()), p.n_kv = *std::max_element(s.n_kv.begin(), s.n_kv.end());
    p.exact_windows = s.exact_windows, p.shared_per_block = device.shared_per_block;
    const int n_rows = s.n_tokens * (s.n_head / s.n_head_kv);
    const GroupCounts counts = kernel_groups(s.head_dim);
    for (const int g : counts.n)
        if (g && (p.groups == 0 || 4 * p.groups < n_rows)) p.groups = g;
    p.n_row_blocks = ceil_div(n_rows, 4 * p.groups);

    std::vector<int> tiles;
    for (const int n : s.n_kv) tiles.push_back(ceil_div(s.uniform_lengths ? p.n_kv : n, kTileKeys));
    const int heads = p.n_head_kv * p.n_row_blocks;
    // The format, if it is known that there is but one.
    const bool one_format =
        !s.formats.empty() && std::all_of(s.formats.begin(), s.formats.end(), [&](CodecId id) { return id == s.formats[0]; });
    const int format =
        one_format && has_own_kernels(s.head_dim, fragment_codec_index(s.formats[0])) ? fragment_codec_index(s.formats[0]) : kAnyFormat;
    const int part = choose_part(tiles, heads, {std::max(1, device.n_sm), kernel_blocks(s.head_dim, p.groups, format)}, s.term);
    bool alike = true;
    std::vector<AttentionPlan::Item> exact;  // little work: last
    for (int i = 0; i < p.n_seq; ++i) {
        const int compressed = parts_of(tiles[i], std::max(1, part)), n = compressed + (s.exact_windows ? 1 : 0), first = p.n_items;
        for (int k = 0; k < compressed; ++k) p.items.push_back({i, k, n, first});
        if (s.exact_windows) exact.push_back({i, compressed, n, first});
        p.n_items += n;
        p.most_splits = std::max(p.most_splits, n);
        alike &= n == p.items.front().n_splits;
    }
    p.items.insert(p.items.end(), exact.begin(), exact.end());
    if (alike) p.splits_each = p.most_splits, p.items.clear();
    p.workspace_bytes = workspace_layout(p).bytes;
    if (takes_prefill(device, s)) plan_prefill(device, p, s.term);
    plan = std::move(p);
    return {};
}

}  // namespace turboquant::cuda
