#include "turboquant/cache/window_attention.h"

#include <algorithm>

namespace turboquant {
namespace {

constexpr std::uint16_t kHidden = 0xfc00;  // -infinity

}  // namespace

bool WindowAttention::split(const AttentionArgs& a, const ExactRows& k, const ExactRows* v, const CellPositions& cells, std::int64_t stream) {
    struct Slot {
        std::size_t slot;
        int cell;
        std::int32_t pos;
    };
    std::vector<Slot> slots;
    const std::int64_t first = stream * cells.n_cells();
    for (std::size_t s = 0; s < k.slots().size(); s++)
        if (const std::int64_t cell = k.slots()[s] - first; k.slots()[s] >= 0 && cell >= 0 && cell < a.n_kv && cells.at(k.slots()[s]) >= 0)
            slots.push_back({s, static_cast<int>(cell), cells.at(k.slots()[s])});
    if (slots.empty()) return false;

    const int n_heads = a.mask ? a.mask_heads : 1;
    const std::size_t n_kv = a.n_kv, n_slots = k.slots().size(), rows = static_cast<std::size_t>(a.n_tokens) * n_heads;
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
            for (const Slot& s : slots) {
                if (!visible(s) || (s.pos >= k.windows().sink && s.pos <= own - k.windows().recent)) continue;
                exact[s.slot] = compressed[s.cell];
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
    exact_.k = k.view(), exact_.v = v ? v->view() : exact_.k;
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
