#include "turboquant/cache/layer_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "turboquant/cache/cpu/cpu_store.h"

namespace turboquant {
namespace {

/// Offset ids of the cells that some query token sees, in ctx.cell_terms as indices into the returned list. Cells of ended sequences keep
/// their ids until they are overwritten, so only the mask tells. ctx.cell_pos gets the positions.
std::vector<int> visible_offsets(CacheContext& ctx, const CellPositions& cells, std::int64_t stream, const AttentionArgs& a) {
    const std::int64_t first = stream * cells.n_cells();
    constexpr std::uint16_t kHidden = 0xfc00;
    std::vector<std::uint8_t> visible(a.n_kv, !a.mask);
    for (int t = 0; a.mask && t < a.n_tokens; t++) {
        const std::uint16_t* mask = a.mask + t * a.mask_token_stride;
        for (int j = 0; j < a.n_kv; j++) visible[j] |= mask[j] != kHidden;
    }
    std::vector<int> list;
    int index[CellPositions::kMaxOffsets];
    std::fill(std::begin(index), std::end(index), -1);
    ctx.cell_terms.assign(a.n_kv, 0);
    ctx.cell_pos.resize(a.n_kv);
    for (int j = 0; j < a.n_kv; j++) {
        ctx.cell_pos[j] = cells.at(first + j);
        if (!visible[j] || ctx.cell_pos[j] < 0) continue;
        const int id = cells.offset_id(first + j);
        int& i = index[id];
        if (i < 0) i = static_cast<int>(list.size()), list.push_back(id);
        ctx.cell_terms[j] = static_cast<std::uint8_t>(i);
    }
    // Hidden cells go on from their neighbours: successive positions and one term per tile are the fast case, and what a hidden cell held
    // before must not choose between two ways to round.
    for (int j = 0; j < a.n_kv; j++)
        if (!visible[j]) {
            ctx.cell_terms[j] = j ? ctx.cell_terms[j - 1] : 0;
            ctx.cell_pos[j] = j && ctx.cell_pos[j - 1] >= 0 ? ctx.cell_pos[j - 1] + 1 : -1;
        }
    return list;
}

}  // namespace

void LayerCache::set_tensor(const KvGeometry& g, StoreFactory store) {
    tensors_[index(g.side)] = std::make_unique<KvTensor>(g, std::move(store));
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
    return write(ctx, tensor(Side::key), batch);
}

bool LayerCache::write_values(CacheContext& ctx, const StoreRows& batch) { return write(ctx, tensor(Side::value), batch); }

bool LayerCache::write(CacheContext& ctx, KvTensor& kv, StoreRows batch) {
    if (kv.exact()) {
        kv.exact()->round(batch.x, batch.stride, batch.rows, *cells_, ctx.rounded);
        batch.x = ctx.rounded.data(), batch.stride = kv.layout().n_embd();
    }
    const bool offset = kv.geometry().side == Side::key && removes_offset();
    if (!(offset ? kv.encode_keys(ctx.store, batch, *cells_) : kv.encode_rows(ctx.store, batch))) return false;
    if (kv.exact()) kv.exact()->add(kernels(), batch.x, batch.rows, *cells_);
    return true;
}

/// Queries for keys with scaled channels, in ctx.scaled_q.
void LayerCache::scale_queries(CacheContext& ctx, AttentionArgs& a) const {
    const KeyOffset& offset = *tensor(Side::key).offset();
    const std::size_t d = tensor(Side::key).head_dim();
    ctx.scaled_q.resize(static_cast<std::size_t>(a.n_tokens) * a.n_head * d);
    float* out = ctx.scaled_q.data();
    for (int t = 0; t < a.n_tokens; t++)
        for (int h = 0; h < a.n_head; h++, out += d)
            offset.scale_query({a.q + t * a.q_token_stride + h * a.q_head_stride, d}, h / (a.n_head / a.n_head_kv), {out, d});
    a.q = ctx.scaled_q.data(), a.q_head_stride = d, a.q_token_stride = a.n_head * d;
}

/// Score terms that give back what offset removal took from the keys: q.R(p)mu.
void LayerCache::set_score_term(CacheContext& ctx, std::int64_t stream, AttentionArgs& a) {
    KeyOffset& offset = *tensor(Side::key).offset();
    const std::vector<int> ids = visible_offsets(ctx, *cells_, stream, a);
    if (ids.empty()) return;
    const std::size_t row = 2 * offset.n_freq(), d = tensor(Side::key).head_dim();
    ctx.q_terms.resize(ids.size() * a.n_tokens * a.n_head * row);
    float* terms = ctx.q_terms.data();
    for (const int id : ids) {
        offset.begin(id, cells_->generation(id));
        for (int t = 0; t < a.n_tokens; t++)
            for (int h = 0; h < a.n_head; h++, terms += row)
                offset.query_terms(id, {a.q + t * a.q_token_stride + h * a.q_head_stride, d}, h / (a.n_head / a.n_head_kv), {terms, row});
    }
    a.term = {offset.n_freq(),     ctx.q_terms.data(),           offset.turns(),
              ctx.cell_pos.data(), static_cast<int>(ids.size()), ctx.cell_terms.data()};
}

/// `plain` has the queries as the model made them.
const char* LayerCache::run_windowed(CacheContext& ctx, const AttentionArgs& a, const AttentionArgs& plain, std::int64_t stream) {
    const KvTensor &keys = tensor(Side::key), &values = a.v_is_k ? keys : tensor(Side::value);
    const ExactRows* v = a.v_is_k ? nullptr : values.exact();
    if (!ctx.windows.split(a, *keys.exact(), v, *cells_, stream)) return keys.store().attend(ctx.store, values.store(), stream, a);
    ctx.windows.set_exact_queries(plain.q, plain.q_token_stride, plain.q_head_stride);
    if (const char* error = keys.store().attend(ctx.store, values.store(), stream, ctx.windows.compressed())) return error;
    run_attention_call(ctx.store, kernels(), ctx.windows.exact());
    const int parts = a.n_tokens < 16 ? 1 : ctx.store.executor->n_threads();
    ctx.store.executor->run(parts, [&](int ith) { ctx.windows.merge(ith, parts); });
    return nullptr;
}

const char* LayerCache::attend(CacheContext& ctx, AttentionArgs a, std::int64_t first_stream, std::span<const StreamQuery> streams) {
    finish_restore(ctx.store);
    const KvTensor &keys = tensor(Side::key), &values = a.v_is_k ? keys : tensor(Side::value);
    const AttentionArgs common = a;
    for (std::size_t i = 0; i < streams.size(); i++) {
        const std::int64_t stream = first_stream + static_cast<std::int64_t>(i);
        a = common;
        a.q = streams[i].q, a.out = streams[i].out, a.mask = streams[i].mask;
        const AttentionArgs plain = a;
        if (removes_offset() && keys.offset()->scaled()) scale_queries(ctx, a);
        if (removes_offset()) set_score_term(ctx, stream, a);
        const char* error = keys.exact() ? run_windowed(ctx, a, plain, stream) : keys.store().attend(ctx.store, values.store(), stream, a);
        if (error) return error;
    }
    end_batch();
    return nullptr;
}

void LayerCache::end_batch() {
    for (const auto& kv : tensors_)
        if (kv && kv->exact()) kv->exact()->trim(*cells_);
}

void LayerCache::save(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, void* out) {
    if (side == Side::key) finish_restore(ctx);
    std::vector<std::uint16_t> row(static_cast<std::size_t>(tensor(side).geometry().n_embd));
    const std::size_t row_bytes = row.size() * sizeof row[0];
    for (std::size_t at = offset, n; at < offset + size; at += n) {
        const std::size_t in_row = at % row_bytes;
        n = std::min(row_bytes - in_row, offset + size - at);
        tensor(side).save_row(static_cast<std::int64_t>(at / row_bytes), *cells_, row);
        std::memcpy(static_cast<char*>(out) + (at - offset), reinterpret_cast<const char*>(row.data()) + in_row, n);
    }
}

RestoreResult LayerCache::restore(StoreContext& ctx, Side side, std::size_t offset, std::size_t size, const void* in) {
    const auto n_embd = static_cast<std::size_t>(tensor(side).geometry().n_embd);
    const std::size_t row_bytes = n_embd * sizeof(std::uint16_t), first = offset / row_bytes,
                      end = (offset + size + row_bytes - 1) / row_bytes;
    std::vector<std::uint16_t> rows((end - first) * n_embd);
    for (const std::size_t r : {first, end - 1})
        if (offset > r * row_bytes || offset + size < (r + 1) * row_bytes)
            tensor(side).save_row(static_cast<std::int64_t>(r), *cells_, std::span(rows).subspan((r - first) * n_embd, n_embd));
    std::memcpy(reinterpret_cast<char*>(rows.data()) + (offset - first * row_bytes), in, size);
    return tensor(side).restore_rows(ctx, static_cast<std::int64_t>(first), static_cast<std::int64_t>(end - first), rows.data(), *cells_,
                                     side == Side::key && cells_->restorer == this);
}

void LayerCache::shift(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    finish_restore(ctx);
    KvTensor& kv = tensor(Side::key);
    kv.rotate(ctx, rope, shift);
    cells_->shift(shift, kv.shift_generation);
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
}

}  // namespace turboquant
