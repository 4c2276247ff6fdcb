#include "turboquant/cache/layer_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace turboquant {
void LayerCache::set_tensor(const KvGeometry& g, StoreFactory store) {
    tensors_[index(g.side)] = std::make_unique<KvTensor>(g, std::move(store));
    carried_[index(g.side)].clear();
    if (g.side == Side::key) rope_known_ = false, shift_generation_ = 0;
}

void LayerCache::bind(Side side, int head_dim, const KeyTreatment& keys) {
    KvTensor& kv = tensor(side);
    if (kv.bound() && kv.head_dim() == head_dim) return;
    kv.bind_head_dim(head_dim);
    if (side != Side::key || !codec_info(kv.geometry().codecs.of(0)).rotated) return;
    // Keys that are values too must be whole: attention can give the offset back to scores only.
    if (keys.remove_offset && has(Side::value)) {
        kv.enable_offset();
        if (!keys.scales.empty()) kv.offset()->set_scales(keys.scales);
        if (!cells_->restorer) cells_->restorer = this;
    } else if (!keys.scales.empty()) {
        throw std::invalid_argument("the plan has scales for keys that serve as values, too; take k_scales out of the plan");
    }
}

void LayerCache::set_rope(const std::optional<RopeParams>& rope) {
    rope_known_ = true;
    if (rope && !cells_->setter) cells_->setter = this;
    KeyOffset* offset = tensor(Side::key).offset();
    if (!offset) return;
    if (rope) offset->set_rope(*rope);
    offset->check_scales();
}

bool LayerCache::removes_offset() const {
    const KeyOffset* offset = tensor(Side::key).offset();
    return offset && (offset->has_rope() || !cells_->setter);
}

void LayerCache::finish_restore(StoreContext& ctx) {
    if (has(Side::key)) lost_ = worse(lost_, tensor(Side::key).finish_restore(ctx, *cells_));
}

/// Keys that waited for their offset came exactly, within windows or not. Before the next rows come both sides' windows are as where they
/// came from, so that these go to the same slots, and are attended to in the same way.
void LayerCache::settle_windows(StoreContext& ctx, std::span<const std::int64_t> rows) {
    for (const auto& kv : tensors_)
        if (kv && kv->bound()) kv->make_way(ctx, rows, *cells_);
    if (has(Side::value)) pair_exact(ctx);
}

bool LayerCache::write_keys(CacheContext& ctx, const StoreRows& batch, std::span<const std::int32_t> pos,
                            std::span<const std::uint8_t> beside) {
    finish_restore(ctx.store);
    if (cells_->setter == this) {
        if (!pos.empty())
            cells_->place(batch.rows, pos, beside);
        else
            for (const std::int64_t row : batch.rows) cells_->forget(row);
    } else if (!cells_->setter) {
        cells_->place_without_rope(batch.rows);
    }
    if (std::exchange(restored_, false)) settle_windows(ctx.store, batch.rows);
    return tensor(Side::key).write(ctx.store, batch, *cells_, removes_offset());
}

bool LayerCache::write_values(CacheContext& ctx, const StoreRows& batch) {
    return tensor(Side::value).write(ctx.store, batch, *cells_, false);
}

/// Score terms that give back what offset removal took from the keys, q.R(p)mu, and the scales.
void LayerCache::set_score_term(const StepPlan& plan, QueryTransform& queries, AttentionArgs& a) {
    KeyOffset& offset = *tensor(Side::key).offset();
    for (const int id : plan.ids) offset.begin(id, cells_->generation(id));
    queries.ids = plan.ids;
    if (plan.ids.empty()) return;
    a.term = {offset.n_freq(), nullptr, offset.turns(), plan.cell_pos.data(), static_cast<int>(plan.ids.size()), plan.cell_term.data()};
}

const char* LayerCache::attend(CacheContext& ctx, AttentionArgs a, std::int64_t first_stream, std::span<const StreamQuery> streams) {
    finish_restore(ctx.store);
    if (!a.v_is_k) pair_exact(ctx.store);
    const KvTensor &keys = tensor(Side::key), &values = a.v_is_k ? keys : tensor(Side::value);
    const AttentionArgs common = a;
    // Plans of a graph stay where they are (StepPlans), so the calls of all streams are put together first.
    calls_.assign(streams.size(), {}), queries_.assign(streams.size(), {});
    for (std::size_t i = 0; i < streams.size(); i++) {
        const std::int64_t stream = first_stream + static_cast<std::int64_t>(i);
        a = common;
        a.q = streams[i].q, a.out = streams[i].out, a.mask = streams[i].mask;
        std::uint64_t plan_number = 0, cells_number = 0;
        const std::int32_t* exact_positions = nullptr;
        const bool offset = removes_offset();
        const ExactRows *k = keys.exact(), *v = k && !a.v_is_k ? values.exact() : nullptr;
        if (offset || k) {
            const std::uint16_t* host_mask = streams[i].host_mask ? streams[i].host_mask : a.mask;
            const StepMask mask{streams[i].mask_id,
                                host_mask,
                                a.mask_token_stride,
                                a.mask_head_stride,
                                a.mask ? a.mask_heads : 1,
                                a.n_tokens,
                                a.n_kv,
                                stream};
            PlanFor store{keys.store().exact_in_pairs(), keys.store().has_masks()};
            if (store.has_masks && !streams[i].host_mask && a.mask)
                store.see = [&](const StepMask& m, std::vector<std::uint16_t>& seen) { keys.store().see_cells(ctx.store, m, seen); };
            const StepPlan& plan = ctx.plans.find(*ctx.store.executor, mask, *cells_, k, v, offset, store);
            plan_number = plan.number, cells_number = offset ? plan.cells_number : 0;
            a.mask_heads = mask.heads;
            // Exact keys are asked with the queries as the model made them.
            a.exact.q = a.q, a.exact.q_token_stride = a.q_token_stride, a.exact.q_head_stride = a.q_head_stride;
            plan.set_exact(a);
            exact_positions = plan.exact_positions.data();
            if (offset) set_score_term(plan, queries_[i], a);
        }
        calls_[i] = {a, offset && keys.offset() ? &queries_[i] : nullptr, plan_number, cells_number, exact_positions};
    }
    // When all offsets have begun: one that begins changes what all calls are given.
    if (keys.offset())
        for (QueryTransform& q : queries_) q.keys = keys.offset()->transform(*cells_);
    const char* error = keys.store().attend_streams(ctx.store, values.store(), first_stream, calls_);
    if (!error) end_batch(ctx.store);
    return error;
}

void LayerCache::pair_exact(StoreContext& ctx) {
    KvTensor &keys = tensor(Side::key), &values = tensor(Side::value);
    if (!keys.exact() || !values.exact() || !keys.store().exact_in_pairs()) return;
    if (std::ranges::equal(keys.exact()->slots(), values.exact()->slots())) return;
    values.pair_exact(ctx, *keys.exact());
    keys.pair_exact(ctx, *values.exact());
}

void LayerCache::end_batch(StoreContext& ctx) {
    for (const auto& kv : tensors_)
        if (kv && kv->bound()) kv->end_batch(ctx, *cells_);
}

void LayerCache::decode(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, std::uint16_t* out) {
    if (side == Side::key) finish_restore(ctx);
    tensor(side).decode_rows(ctx, first, n, *cells_, out);
    tensor(side).end_batch(ctx, *cells_);
}

void LayerCache::save_rows(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, RowWriter& out) {
    if (side == Side::key) finish_restore(ctx);
    tensor(side).save_rows(ctx, first, n, *cells_, out);
}

RestoreResult LayerCache::restore_rows(StoreContext& ctx, Side side, std::int64_t first, std::int64_t n, RowReader& in) {
    restored_ = true;
    return tensor(side).restore_rows(ctx, first, n, in, *cells_, side == Side::key && cells_->restorer == this);
}

// Rows of a state that is being restored stay as they are.
void LayerCache::save_as_llama(StoreContext& ctx, Side side, std::size_t first, std::size_t n, std::uint16_t* out) {
    const KvTensor& kv = tensor(side);
    const auto row = static_cast<std::int64_t>(first);
    cells_->save_order().begin(&kv, row);
    SavedRowWriter writer(out, static_cast<std::size_t>(kv.geometry().n_embd), row, cells_->save_order());
    kv.save_rows(ctx, row, static_cast<std::int64_t>(n), *cells_, writer);
}

void LayerCache::save(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, void* out) {
    if (side == Side::key) finish_restore(ctx);
    std::vector<std::uint16_t> row(static_cast<std::size_t>(tensor(side).geometry().n_embd));
    const std::size_t row_bytes = row.size() * sizeof row[0], end = offset + size;
    for (std::size_t at = offset, n; at < end; at += n) {
        char* to = static_cast<char*>(out) + (at - offset);
        const bool aligned = reinterpret_cast<std::uintptr_t>(to) % alignof(std::uint16_t) == 0;
        const std::size_t r = at / row_bytes, in_row = at % row_bytes;
        if (const std::size_t whole = in_row == 0 && aligned ? (end - at) / row_bytes : 0) {
            n = whole * row_bytes;
            save_as_llama(ctx, side, r, whole, reinterpret_cast<std::uint16_t*>(to));
            continue;
        }
        n = std::min(row_bytes - in_row, end - at);
        save_as_llama(ctx, side, r, 1, row.data());
        std::memcpy(to, reinterpret_cast<const char*>(row.data()) + in_row, n);
    }
}

RestoreResult LayerCache::restore(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, const void* in) {
    const auto n_embd = static_cast<std::size_t>(tensor(side).geometry().n_embd);
    const std::size_t row_bytes = n_embd * sizeof(std::uint16_t), first = offset / row_bytes,
                      end = (offset + size + row_bytes - 1) / row_bytes;
    const auto restore_from = [&](const std::uint16_t* from) {
        SavedRowReader reader(from, n_embd, side, carried_[index(side)]);
        return restore_rows(ctx, side, static_cast<std::int64_t>(first), static_cast<std::int64_t>(end - first), reader);
    };
    const bool whole = offset % row_bytes == 0 && size % row_bytes == 0;
    if (whole && reinterpret_cast<std::uintptr_t>(in) % alignof(std::uint16_t) == 0)
        return restore_from(static_cast<const std::uint16_t*>(in));
    std::vector<std::uint16_t> rows((end - first) * n_embd);
    for (const std::size_t r : {first, end - 1})
        if (offset > r * row_bytes || offset + size < (r + 1) * row_bytes)
            save_as_llama(ctx, side, r, 1, rows.data() + (r - first) * n_embd);
    std::memcpy(reinterpret_cast<char*>(rows.data()) + (offset - first * row_bytes), in, size);
    return restore_from(rows.data());
}

void LayerCache::shift(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    finish_restore(ctx);
    tensor(Side::key).rotate(ctx, rope, shift);
    cells_->shift(shift, shift_generation_);
}

void LayerCache::copy_stream(StoreContext& ctx, Side side, std::int64_t src, std::int64_t dst) {
    if (side == Side::key) finish_restore(ctx);
    tensor(side).freeze();
    tensor(side).copy_stream(src, dst);
    if (side == Side::key) cells_->copy_stream(src, dst);
}

void LayerCache::clear() {
    for (const auto& kv : tensors_)
        if (kv) kv->reset();
    for (CarriedOffsets& c : carried_) c.clear();
}

}  // namespace turboquant
