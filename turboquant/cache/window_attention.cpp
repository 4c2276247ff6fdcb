#include "turboquant/cache/window_attention.h"

#include <algorithm>
#include <utility>

namespace turboquant {
namespace {

constexpr std::uint16_t kHidden = 0xfc00;  // -infinity

/// Rows as `raw` tiles [tile][head], in the order of `slots`.
TileView gather(const ExactRows& rows, std::span<const std::size_t> slots, std::vector<std::uint8_t>& tiles) {
    const TileShape shape{CodecId::raw, rows.side(), rows.head_dim()};
    const std::size_t bytes = tile_bytes(shape), d = shape.head_dim, n_head = rows.n_head();
    tiles.resize((slots.size() + kTileKeys - 1) / kTileKeys * n_head * bytes);
    for (std::size_t i = 0; i < slots.size(); i++) {
        const std::uint16_t* x = rows.values(slots[i]).data();
        for (std::size_t h = 0; h < n_head; h++, x += d)
            tile_set_row(shape, tiles.data() + (i / kTileKeys * n_head + h) * bytes, static_cast<int>(i % kTileKeys),
                         reinterpret_cast<const std::uint8_t*>(x));
    }
    return {shape, tiles.data(), bytes, n_head * bytes};
}

}  // namespace

bool WindowAttention::split(const AttentionArgs& a, const ExactRows& k, const ExactRows* v, const CellPositions& cells,
                            std::int64_t stream) {
    struct Slot {
        std::size_t k, v;  // in the stores
        int cell;
        std::int32_t pos;
    };
    std::vector<Slot> slots;
    const std::int64_t first = stream * cells.n_cells();
    for (std::size_t s = 0; s < k.slots().size(); s++) {
        const std::int64_t row = k.slots()[s];
        if (row < first || row >= first + a.n_kv || cells.at(row) < 0) continue;
        // Keys and values mostly have the same slots; a restored row may be exact on one side only.
        std::size_t at = s;
        if (v && (s >= v->slots().size() || v->slots()[s] != row))
            at = static_cast<std::size_t>(std::ranges::find(v->slots(), row) - v->slots().begin());
        if (!v || at < v->slots().size()) slots.push_back({s, at, static_cast<int>(row - first), cells.at(row)});
    }
    if (slots.empty()) return false;
    // What slots they lie in must not decide in what order is summed.
    std::ranges::sort(slots, {}, [](const Slot& s) { return std::pair(s.pos, s.cell); });

    const int n_heads = a.mask ? a.mask_heads : 1;
    const std::size_t n_kv = a.n_kv, n_slots = slots.size(), rows = static_cast<std::size_t>(a.n_tokens) * n_heads;
    compressed_mask_.assign(rows * n_kv, 0);
    exact_mask_.assign(rows * n_slots, kHidden);
    bool any = false;
    for (int t = 0; t < a.n_tokens; t++) {
        const auto row = [&](int h) { return a.mask + t * a.mask_token_stride + h * a.mask_head_stride; };
        const auto visible = [&](const Slot& s) { return !a.mask || row(0)[s.cell] != kHidden; };
        std::int32_t own = -1;  // the query's position: its own cell is the last that it sees, and was just written
        for (const Slot& s : slots)
            if (visible(s)) own = std::max(own, s.pos);
        for (int h = 0; h < n_heads; h++) {
            std::uint16_t* compressed = compressed_mask_.data() + (static_cast<std::size_t>(t) * n_heads + h) * n_kv;
            std::uint16_t* exact = exact_mask_.data() + (static_cast<std::size_t>(t) * n_heads + h) * n_slots;
            if (a.mask) std::copy_n(row(h), n_kv, compressed);
            for (std::size_t i = 0; i < n_slots; i++) {
                const Slot& s = slots[i];
                if (!visible(s) || (s.pos >= k.windows().sink && s.pos <= own - k.windows().recent)) continue;
                exact[i] = compressed[s.cell];
                compressed[s.cell] = kHidden;
                any = true;
            }
        }
    }
    if (!any) return false;

    const std::size_t n_rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    lse_.resize(n_rows), exact_lse_.resize(n_rows), exact_out_.resize(n_rows * a.v_dim_out);
    compressed_ = exact_ = a;
    compressed_.mask = compressed_mask_.data();
    compressed_.mask_token_stride = n_heads * n_kv, compressed_.mask_head_stride = n_kv, compressed_.mask_heads = n_heads;
    compressed_.lse = lse_.data();
    exact_.n_kv = static_cast<int>(n_slots);
    std::vector<std::size_t> index(n_slots);
    std::ranges::transform(slots, index.begin(), &Slot::k);
    exact_.k = exact_.v = gather(k, index, k_tiles_);
    std::ranges::transform(slots, index.begin(), &Slot::v);
    if (v) exact_.v = gather(*v, index, v_tiles_);
    exact_.term = {};
    exact_.sinks = nullptr;  // takes part once
    exact_.mask = exact_mask_.data();
    exact_.mask_token_stride = n_heads * n_slots, exact_.mask_head_stride = n_slots, exact_.mask_heads = n_heads;
    exact_.out = exact_out_.data();
    exact_.out_head_stride = a.v_dim_out, exact_.out_token_stride = static_cast<std::size_t>(a.n_head) * a.v_dim_out;
    exact_.lse = exact_lse_.data();
    return true;
}

void WindowAttention::merge(int ith, int n) const {
    const int rows = compressed_.n_tokens * compressed_.n_head;
    merge_results(compressed_, exact_, static_cast<int>(static_cast<std::int64_t>(rows) * ith / n),
                  static_cast<int>(static_cast<std::int64_t>(rows) * (ith + 1) / n));
}

}  // namespace turboquant
