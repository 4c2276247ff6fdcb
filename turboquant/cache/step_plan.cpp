#include "turboquant/cache/step_plan.h"

#include <algorithm>
#include <utility>

namespace turboquant {
namespace {

struct Exact {
    std::int32_t k, v;  // slots
    std::int32_t cell, pos;
};

/// What some query may want of the rows that are kept, in order.
std::vector<Exact> kept_rows(const StepMask& m, const CellPositions& cells, const ExactRows& k, const ExactRows* v, bool in_pairs) {
    std::vector<Exact> rows;
    const std::int64_t first = m.stream * cells.n_cells();
    for (std::size_t s = 0; s < k.slots().size(); s++) {
        const std::int64_t row = k.slots()[s];
        if (row < first || row >= first + m.n_kv || cells.at(row) < 0) continue;
        // Keys and values mostly have the same slots; a restored row may be exact on one side only.
        auto at = static_cast<std::int32_t>(s);
        if (v && (s >= v->slots().size() || v->slots()[s] != row)) at = in_pairs ? -1 : v->find(row);
        if (at >= 0) rows.push_back({static_cast<std::int32_t>(s), at, static_cast<std::int32_t>(row - first), cells.at(row)});
    }
    const bool by_cell = k.windows().residual();
    std::ranges::sort(rows, {}, [by_cell](const Exact& e) { return std::pair(by_cell ? 0 : e.pos, e.cell); });
    return rows;
}

/// The query's position: its own cell is the last that it sees, and was just written. `mask`: of its first head, or null.
std::int32_t own_position(std::span<const Exact> rows, const std::uint16_t* mask) {
    std::int32_t own = -1;
    for (const Exact& e : rows)
        if (!mask || mask[e.cell] != kMaskHidden) own = std::max(own, e.pos);
    return own;
}

/// Whether a query wants a row: it sees the cell, and the row is in its window.
bool wants(const Exact& e, const std::uint16_t* mask, std::int32_t own, const WindowSizes& windows) {
    return (!mask || mask[e.cell] != kMaskHidden) && (e.pos < windows.sink || e.pos > own - windows.recent);
}

/// Tiles with exact rows as a query sees them, before these are taken out: their masks.
void copy_masks(const StepMask& m, std::span<const int> tiles, const std::uint16_t* mask, int t, int h, StepPlan& plan) {
    for (std::size_t i = 0; i < tiles.size(); i++) {
        const int first = tiles[i] * kTileKeys, cells = std::min(kTileKeys, m.n_kv - first);
        std::uint16_t* to = plan.patches.data() + ((i * m.n_tokens + t) * m.heads + h) * kTileKeys;
        std::fill_n(to, kTileKeys, kMaskHidden);
        if (mask)
            std::copy_n(mask + first, cells, to);
        else
            std::fill_n(to, cells, std::uint16_t{0});
    }
}

void list_rows(std::span<const Exact> rows, StepPlan& plan) {
    plan.k_slots.clear(), plan.v_slots.clear(), plan.exact_cells.clear(), plan.exact_positions.clear();
    for (const Exact& e : rows) {
        plan.k_slots.push_back(e.k), plan.v_slots.push_back(e.v);
        plan.exact_cells.push_back(e.cell), plan.exact_positions.push_back(e.pos);
    }
}

void plan_masks(Executor& executor, const StepMask& m, std::span<const Exact> rows, WindowSizes windows, StepPlan& plan) {
    const std::size_t n = rows.size();
    std::vector<int> tiles;  // patched ones
    if (!windows.residual()) plan.tile_patch.assign((m.n_kv + kTileKeys - 1) / kTileKeys, -1);
    for (const Exact& e : rows) {
        if (windows.residual()) break;
        std::int16_t& patch = plan.tile_patch[e.cell / kTileKeys];
        if (patch < 0) patch = static_cast<std::int16_t>(tiles.size()), tiles.push_back(e.cell / kTileKeys);
    }
    plan.exact_mask.resize(static_cast<std::size_t>(m.n_tokens) * m.heads * n);
    plan.patches.resize(tiles.size() * m.n_tokens * m.heads * kTileKeys);
    const int parts = m.n_tokens < 16 ? 1 : executor.n_threads();
    executor.run(parts, [&](int ith) {
        for (int t = ith; t < m.n_tokens; t += parts) {
            const std::uint16_t* seen = m.mask ? m.mask + t * m.token_stride : nullptr;
            const std::int32_t own = own_position(rows, seen);
            for (int h = 0; h < m.heads; h++) {
                copy_masks(m, tiles, seen ? seen + h * m.head_stride : nullptr, t, h, plan);
                std::uint16_t* exact = plan.exact_mask.data() + (static_cast<std::size_t>(t) * m.heads + h) * n;
                for (std::size_t i = 0; i < n; i++) {
                    const Exact& e = rows[i];
                    const bool wanted = wants(e, seen, own, windows);
                    exact[i] = wanted ? 0 : kMaskHidden;
                    if (!wanted || windows.residual()) continue;
                    const std::size_t patch = plan.tile_patch[e.cell / kTileKeys];
                    std::uint16_t& in_tile = plan.patches[((patch * m.n_tokens + t) * m.heads + h) * kTileKeys + e.cell % kTileKeys];
                    exact[i] = std::exchange(in_tile, kMaskHidden);
                }
            }
        }
    });
}

}  // namespace

void StepPlan::set_exact(AttentionArgs& a) const {
    if (k_slots.empty()) return;
    if (!tile_patch.empty()) a.patch = {tile_patch.data(), patches.data()};
    a.exact.n = static_cast<int>(k_slots.size());
    a.exact.k_slots = k_slots.data(), a.exact.v_slots = v_slots.data(), a.exact.cells = exact_cells.data();
    a.exact.mask = exact_mask.empty() ? nullptr : exact_mask.data();
}

const StepPlan& StepPlans::find(Executor& executor, const StepMask& m, const CellPositions& cells, const ExactRows* k, const ExactRows* v,
                                bool with_offsets, const PlanFor& store) {
    const std::span<const std::int64_t> k_rows = k ? k->slots() : std::span<const std::int64_t>(),
                                        v_rows = v ? v->slots() : std::span<const std::int64_t>();
    const WindowSizes windows = k ? k->windows() : WindowSizes{0, 0, WindowForm::halves};
    for (std::size_t i = 0; i < n_valid_; i++) {
        const Entry& e = entries_[i];
        if (e.mask == m && e.cells == &cells && e.version == cells.version() && e.with_offsets >= with_offsets &&
            e.with_windows == (k != nullptr) && e.in_pairs == store.in_pairs && e.has_masks == store.has_masks && e.windows == windows &&
            std::ranges::equal(e.k_rows, k_rows) && std::ranges::equal(e.v_rows, v_rows))
            return e.plan;
    }
    if (n_valid_ == entries_.size()) entries_.emplace_back();
    Entry& e = entries_[n_valid_++];
    e.mask = m, e.cells = &cells, e.version = cells.version(), e.with_offsets = with_offsets, e.with_windows = k != nullptr;
    e.windows = windows, e.in_pairs = store.in_pairs, e.has_masks = store.has_masks;
    e.plan.number = graph_ << 16 | (n_valid_ - 1);
    e.k_rows.assign(k_rows.begin(), k_rows.end()), e.v_rows.assign(v_rows.begin(), v_rows.end());
    if (with_offsets) e.plan.set(executor, m, cells, store.see);
    const std::vector<Exact> rows = k ? kept_rows(m, cells, *k, v, store.in_pairs) : std::vector<Exact>();
    list_rows(rows, e.plan);
    e.plan.tile_patch.clear(), e.plan.exact_mask.clear();
    if (!store.has_masks && !rows.empty()) plan_masks(executor, m, rows, windows, e.plan);
    return e.plan;
}

}  // namespace turboquant
