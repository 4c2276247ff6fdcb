#include "turboquant/cache/cpu/cpu_store.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>

#include "turboquant/cache/queries.h"
#include "turboquant/codec/composite.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

/// Runs an attention call on the context's threads.
void run_attention_call(StoreContext& ctx, const Kernels& k, const AttentionArgs& a) {
    const std::int64_t work = static_cast<std::int64_t>(a.n_tokens) * a.n_head * a.n_kv;
    const AttentionPlan plan = plan_attention(a, work < 4096 ? 1 : ctx.executor->n_threads());
    if (ctx.workspace.size() < plan.workspace_bytes + 64) ctx.workspace.resize(plan.workspace_bytes + 64);
    auto* ws = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(ctx.workspace.data()) + 63) / 64 * 64);
    ctx.executor->run(plan.n_threads, [&](int ith) { run_attention(k, plan, a, ws, ith); });
    if (plan.n_chunks > 1) ctx.executor->run(plan.n_threads, [&](int ith) { merge_attention(k, plan, a, ws, ith); });
}

}  // namespace

CpuStore::CpuStore(const Layout& layout, std::uint8_t* memory, const Kernels& k) : TileStore(layout), memory_(memory), kernels_(&k) {}

TileView CpuStore::view(std::int64_t stream) const {
    return {layout_.shape(), memory_ + stream * layout_.stream_bytes(), tile_bytes(layout_.shape()), layout_.tile_stride(),
            layout_.heads().empty() ? nullptr : layout_.heads().data()};
}

bool CpuStore::write(StoreContext& ctx, const StoreRows& in, const KeyTransform* keys) {
    const StoreRows rows = round_rows(layout_.side(), layout_.n_embd(), in, ctx.workspace);
    const auto most = std::ranges::max_element(rows.exact_slots);
    const bool residual = layout_.windows().residual();
    // There before threads write to slots.
    if (residual && most != rows.exact_slots.end()) hold_residuals(static_cast<std::size_t>(std::max(*most, -1) + 1));
    for (std::size_t i = 0; i < rows.exact_slots.size() && !residual; i++)
        if (rows.exact_slots[i] >= 0) to_halves(*kernels_, rows.x + i * rows.stride, layout_.n_embd(), exact_row(rows.exact_slots[i]));
    // Split over heads: tiles of different heads are disjoint.
    const int n_head = layout_.n_head();
    const int parts = static_cast<int>(rows.rows.size()) * n_head < 64 ? 1 : std::min(ctx.executor->n_threads(), n_head);
    std::atomic<bool> finite = true;
    ctx.executor->run(parts, [&](int ith) {
        if (!write_part(rows, keys, ith, parts)) finite = false;
    });
    return finite;
}

/// Every parts-th head.
bool CpuStore::write_part(const StoreRows& rows, const KeyTransform* keys, int ith, int parts) {
    constexpr std::size_t kBlock = 32;  // the rotations of so many positions stay in the cache while all heads use them
    const std::size_t d = layout_.head_dim();
    std::array<std::int64_t, kBlock> places;
    std::array<float, kBlock * 2 * kMaxHeadDim> turns;
    std::array<const float*, kBlock> offsets;
    std::array<float, kBlock * kMaxHeadDim> scaled;
    std::array<std::uint8_t*, kBlock> residuals;
    const bool window = layout_.windows().residual() && std::ranges::any_of(rows.exact_slots, [](std::int32_t s) { return s >= 0; });
    bool finite = true;
    for (std::size_t first = 0; first < rows.rows.size(); first += kBlock) {
        const auto block = rows.rows.subspan(first, std::min(kBlock, rows.rows.size() - first));
        for (std::size_t i = 0; i < block.size(); i++) {
            places[i] = layout_.place(block[i]);
            if (!keys) continue;
            const std::int32_t cell = keys->cells[block[i]];
            offsets[i] = cell >= 0 ? keys->mu[CellPositions::id_of(cell)] : nullptr;
            if (offsets[i]) spread_turn(keys->rope, layout_.head_dim(), CellPositions::position_of(cell), turns.data() + i * 2 * d);
        }
        for (int h = ith; h < layout_.n_head(); h += parts) {
            EncodeArgs args;
            args.shape = layout_.shape(h);
            args.tiles = memory_ + layout_.head_at(h);
            args.tile_stride = layout_.tile_stride();
            args.x = rows.x + first * rows.stride + h * d;
            args.x_stride = rows.stride;
            args.cells = places.data();
            args.n = static_cast<int>(block.size());
            args.norm_mode = layout_.norm_mode();
            if (keys && keys->scales) {
                for (std::size_t i = 0; i < block.size(); i++)
                    std::transform(args.x + i * rows.stride, args.x + i * rows.stride + d, keys->scales + h * d, scaled.data() + i * d,
                                   std::multiplies<>());
                args.x = scaled.data(), args.x_stride = d;
            }
            if (keys) args.turns = turns.data(), args.offsets = offsets.data(), args.offset_at = static_cast<std::size_t>(h) * 2 * d;
            if (!masks_.empty()) {
                const std::uint8_t* last = nullptr;
                for (const std::int64_t row : block) {
                    std::uint8_t* t = tile(row, h);
                    if (t != last) composite_set_mask(layout_.shape(), t, std::span(masks_).subspan(h * d, d));
                    last = t;
                }
            }
            finite = encode(*kernels_, args) && finite;
            if (!window) continue;
            for (std::size_t i = 0; i < block.size(); i++) {
                const std::int32_t slot = rows.exact_slots[first + i];
                residuals[i] = slot >= 0 ? residual(slot, h) : nullptr;
            }
            encode_residuals(*kernels_, args, residuals.data());
        }
    }
    return finite;
}

const char* CpuStore::attend(StoreContext& ctx, const TileStore& values, std::int64_t stream, const StreamCall& call) const {
    AttentionArgs a = call.args;
    if (call.queries) transform_queries(ctx, layout_.head_dim(), *call.queries, a);
    a.k = view(stream);
    a.v = static_cast<const CpuStore&>(values).view(stream);
    set_exact(values, a.exact);
    if (const char* error = check_attention_args(a)) return error;
    run_attention_call(ctx, *kernels_, a);
    return nullptr;
}

std::vector<std::int64_t> CpuStore::places(std::int64_t first, std::int64_t n) const {
    std::vector<std::int64_t> places(n);
    for (std::int64_t i = 0; i < n; i++) places[i] = layout_.place(first + i);
    return places;
}

void CpuStore::read(StoreContext& ctx, std::int64_t first, std::int64_t n, float* x) const {
    DecodedRows out;
    out.x = x, out.stride = layout_.n_embd();
    decode_rows(*kernels_, *ctx.executor, tiles(), places(first, n), out);
}

void CpuStore::rows_out(StoreContext& ctx, std::int64_t first, std::int64_t n, std::uint8_t* out, std::size_t stride) const {
    get_rows(*kernels_, *ctx.executor, tiles(), places(first, n), out, stride);
}

void CpuStore::rows_in(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint8_t* in, std::size_t stride) {
    set_rows(*kernels_, *ctx.executor, tiles(), places(first, n), in, stride);
}

void CpuStore::rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    std::map<std::int32_t, std::vector<float>> tables;
    std::vector<std::int64_t> moved;
    std::vector<const float*> by_row;
    for (std::size_t row = 0; row < shift.size(); row++) {
        if (shift[row] == 0) continue;
        std::vector<float>& table = tables[shift[row]];
        if (table.empty()) table.resize(rope.n_dims), rope_table(rope, static_cast<float>(shift[row]), table);
        moved.push_back(layout_.place(static_cast<std::int64_t>(row)));
        by_row.push_back(table.data());
    }
    const PairTurn pairs{rope.n_offset, rope.n_dims, rope.pairs == RopePairs::adjacent};
    rotate_rows(*kernels_, *ctx.executor, tiles(), moved, pairs, by_row, layout_.norm_mode());
}

void CpuStore::copy_stream(std::int64_t src, std::int64_t dst) {
    const std::size_t bytes = layout_.stream_bytes();
    if (src != dst) std::memcpy(memory_ + dst * bytes, memory_ + src * bytes, bytes);
}

void CpuStore::set_outliers(int n, std::span<const std::uint8_t> masks, std::span<const std::int64_t> written) {
    for (const std::int64_t row : written)
        for (int h = 0; h < layout_.n_head(); h++) std::fill_n(tile(row, h), tile_bytes(layout_.shape()), std::uint8_t{0});
    layout_.set_n_outliers(n);
    masks_.assign(masks.begin(), masks.end());
}

StoreFactory cpu_store_in(std::uint8_t* memory, const Kernels& k) {
    return [memory, &k](const Layout& layout) { return std::make_unique<CpuStore>(layout, memory, k); };
}

}  // namespace turboquant
