// Rows that leave the cache: decoded, or as snapshots (snapshot.h).
#include <algorithm>
#include <map>

#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/half.h"
#include "turboquant/kernels/executor.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant {

std::optional<std::vector<float>> KvTensor::exact_row(std::int64_t row, const CellPositions& cells) const {
    const std::int32_t slot = exact_->find(row);
    if (slot < 0) return std::nullopt;
    std::vector<float> x(layout().n_embd());
    if (has_residuals()) return read_window_row(row, slot, cells, x), x;
    std::vector<std::uint16_t> halves(x.size());
    store_->exact_out(slot, halves.data());
    std::transform(halves.begin(), halves.end(), x.begin(), from_half);
    return x;
}

/// Code and residual of a row, in the model's space.
void KvTensor::read_window_row(std::int64_t row, std::int32_t slot, const CellPositions& cells, std::span<float> x) const {
    SerialExecutor executor;
    StoreContext ctx{&executor};
    store_->read_window(ctx, {&row, 1}, {&slot, 1}, x.data());
    add_offset(row, cells, x);
}

void KvTensor::read_row(std::int64_t row, const CellPositions& cells, std::span<float> x) const {
    SerialExecutor executor;
    StoreContext ctx{&executor};
    store_->read(ctx, row, 1, x.data());
    add_offset(row, cells, x);
}

void KvTensor::add_offset(std::int64_t row, const CellPositions& cells, std::span<float> x) const {
    if (offset_) offset_->add_offset(cells.at(row) >= 0 ? cells.offset_id(row) : 0, x, cells.at(row));
}

void KvTensor::decode_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, const CellPositions& cells, std::uint16_t* out) const {
    const std::size_t n_embd = layout().n_embd();
    const std::int64_t first_tile = first / kTileKeys, n_tiles = (first + n + kTileKeys - 1) / kTileKeys - first_tile;
    const int parts = static_cast<int>(std::clamp<std::int64_t>(n_tiles, 1, ctx.executor->n_threads()));
    ctx.executor->run(parts, [&](int ith) {
        SerialExecutor serial;
        StoreContext part{&serial};
        if (parts == 1) part.device = ctx.device;
        std::vector<float> x(kTileKeys * n_embd);
        for (std::int64_t t = ith; t < n_tiles; t += parts) {
            const std::int64_t begin = std::max(first, (first_tile + t) * kTileKeys);
            const std::int64_t end = std::min(first + n, (first_tile + t + 1) * kTileKeys);
            store_->read(part, begin, end - begin, x.data());
            for (std::int64_t row = begin; row < end; row++) add_offset(row, cells, {x.data() + (row - begin) * n_embd, n_embd});
            to_halves(kernels(), x.data(), (end - begin) * n_embd, out + (begin - first) * n_embd);
        }
    });
    if (!exact_) return;
    std::vector<float> x(n_embd);
    for (std::size_t s = 0; s < exact_->slots().size(); s++) {
        const std::int64_t row = exact_->slots()[s];
        const auto slot = static_cast<std::int32_t>(s);
        std::uint16_t* to = out + (row - first) * n_embd;
        if (row < first || row >= first + n) continue;
        if (!has_residuals()) {
            store_->exact_out(slot, to);
            continue;
        }
        read_window_row(row, slot, cells, x);
        to_halves(kernels(), x.data(), n_embd, to);
    }
}

// Rows that are saved as fp16 values whatever the format, or none: as the store has them. `slot`: of an exact row, or -1. `values`: memory.
std::optional<RowSnapshot> KvTensor::kept_row(std::int64_t row, std::int32_t slot, const CellPositions& cells, bool takes_exact,
                                              std::vector<std::uint16_t>& values) const {
    RowSnapshot s;
    if (const KeptRow* kept = first_.find(row)) {
        s.values = kept->values;
        return s;
    }
    s.sequence = cells.offset_id(row);
    s.pos = offset_ ? cells.at(row) : -1;
    const bool frozen = s.pos >= 0 && offset_->frozen(s.sequence);
    if (const KeptRow* kept = s.pos >= 0 && !frozen ? offset_->find_kept(s.sequence, row, s.pos) : nullptr) {
        s.kind = RowKind::measuring, s.values = kept->values;
        return s;
    }
    if (slot < 0 || has_residuals() || (offset_ && !(frozen && takes_exact))) return std::nullopt;
    values.resize(layout().n_embd());
    store_->exact_out(slot, values.data());
    s.values = values;
    if (offset_) s.kind = RowKind::exact, s.mu_hash = offset_->mu_hash(s.sequence);
    return s;
}

// As the store has them: codes, or values where the format is one of plain values. `i`: number of the first one in the call.
// `slots`: of exact rows, or -1.
void KvTensor::save_stored(StoreContext& ctx, std::int64_t first, std::int64_t n, std::int64_t i, std::span<const std::int32_t> slots,
                           const CellPositions& cells, RowWriter& out) const {
    RowSnapshot s;
    if (!codec_info(g_.codecs.of(0)).rotated) {
        std::uint8_t* values = out.begin(i, s);
        for (std::int64_t k = 1; k < n; k++) out.begin(i + k, s);
        if (g_.codecs == CodecId::raw) return store_->rows_out(ctx, first, n, values, out.stride());
        const std::size_t n_embd = layout().n_embd();
        std::vector<float> x(n * n_embd);
        store_->read(ctx, first, n, x.data());
        for (std::int64_t k = 0; k < n; k++)
            to_halves(kernels(), x.data() + k * n_embd, n_embd, reinterpret_cast<std::uint16_t*>(values + k * out.stride()));
        return;
    }
    const RowForm form = this->form();
    s.kind = RowKind::codes, s.form = &form;
    struct Mu {
        std::vector<std::uint16_t> halves;
        std::uint32_t hash;
    };
    std::map<int, Mu> mus;
    std::vector<std::uint8_t> residual(has_residuals() ? layout().window_row_bytes() : 0);
    std::uint8_t* codes = nullptr;
    for (std::int64_t k = 0; k < n; k++) {
        s.pos = offset_ ? cells.at(first + k) : -1;
        s.mu = {}, s.mu_hash = 0;
        if (s.pos >= 0) {
            s.sequence = cells.offset_id(first + k);
            Mu& mu = mus[s.sequence];
            if (mu.halves.empty()) {
                mu.halves = offset_->mu_halves(s.sequence);
                mu.hash = offset_->frozen(s.sequence) ? offset_->mu_hash(s.sequence) : hash_mu(mu.halves);
            }
            s.mu = mu.halves, s.mu_hash = mu.hash;
        }
        const bool has_residual = has_residuals() && slots[k] >= 0;
        if (has_residual) store_->residual_out(slots[k], residual.data());
        s.residual = has_residual ? std::span<const std::uint8_t>(residual) : std::span<const std::uint8_t>();
        std::uint8_t* at = out.begin(i + k, s);
        if (k == 0) codes = at;
    }
    store_->rows_out(ctx, first, n, codes, out.stride());
}

void KvTensor::save_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, const CellPositions& cells, RowWriter& out) const {
    std::vector<std::uint16_t> values;
    const std::vector<std::int32_t> slots = exact_ ? exact_->find(first, n) : std::vector<std::int32_t>(n, -1);
    std::int64_t stored = 0;  // rows before i that are still to be saved
    const auto save = [&](std::int64_t i) {
        if (stored) save_stored(ctx, first + i - stored, stored, i - stored, std::span(slots).subspan(i - stored, stored), cells, out);
        stored = 0;
    };
    for (std::int64_t i = 0; i < n; i++) {
        const std::optional<RowSnapshot> kept = kept_row(first + i, slots[i], cells, out.takes_exact(), values);
        if (!kept) {
            stored++;
            continue;
        }
        save(i);
        out.write(i, *kept);
    }
    save(n);
}

}  // namespace turboquant
