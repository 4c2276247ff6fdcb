// Rows that come into the cache, as snapshots (snapshot.h): what each is, where it stands, and then either its codes are copied or its
// values are encoded. Some wait: for the rest of the offset that was removed from them, which comes with other rows.
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/half.h"
#include "turboquant/codec/residual.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/kernels/executor.h"

namespace turboquant {
namespace {

/// Decodes codes, and their residual, to x (n_embd values in the model's space, without the removed offset).
void decode_codes(const RowSnapshot& s, std::span<float> x) {
    const RowForm& f = *s.form;
    const std::uint8_t* codes = s.codes.data();
    std::vector<std::uint8_t> tile;
    for (int head = 0; head * f.head_dim < static_cast<int>(x.size()); codes += f.head_bytes(head), head++) {
        const TileShape shape{f.codecs.of(head), Side::key, f.head_dim};
        const auto out = x.subspan(static_cast<std::size_t>(head) * f.head_dim, f.head_dim);
        tile.assign(tile_bytes(shape), 0);
        tile_set_row(shape, tile.data(), 0, codes);
        tile_decode_rotated(shape, tile.data(), 0, out);
        if (!s.residual.empty()) residual_add(s.residual.data() + head * residual_bytes(f.head_dim), out);
        rotation_for(f.head_dim).inverse(out);
    }
}

/// False for a damaged row: the scale at the end of a head's codes, or of its residual, is infinite or NaN.
bool scales_finite(const RowSnapshot& s) {
    std::size_t end = 0;
    for (int head = 0; end < s.codes.size(); head++)
        if (end += s.form->head_bytes(head); (s.codes[end - 1] & 0x7c) == 0x7c) return false;
    const std::size_t bytes = residual_bytes(s.form->head_dim);
    for (end = bytes; end <= s.residual.size(); end += bytes)
        if ((s.residual[end - 1] & 0x7c) == 0x7c) return false;
    return true;
}

/// scales_finite() of all rows, 0 for those that are no codes. Here every row is fetched from memory, so all threads do it.
std::vector<std::uint8_t> sound_codes(Executor& executor, std::span<const RowSnapshot> rows) {
    std::vector<std::uint8_t> sound(rows.size());
    constexpr std::size_t kWorthAThread = 64;
    const int parts = std::clamp(static_cast<int>(rows.size() / kWorthAThread), 1, executor.n_threads());
    executor.run(parts, [&](int ith) {
        const std::size_t end = rows.size() * (ith + 1) / parts;
        for (std::size_t i = rows.size() * ith / parts; i < end; i++) sound[i] = rows[i].kind == RowKind::codes && scales_finite(rows[i]);
    });
    return sound;
}

/// False if one is not finite, then all are zero.
bool decode_values(std::span<const std::uint16_t> row, std::span<float> x) {
    std::transform(row.begin(), row.end(), x.begin(), from_half);
    const bool finite = std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
    if (!finite) std::fill(x.begin(), x.end(), 0.0f);
    return finite;
}

}  // namespace

void KvTensor::begin_restore(std::int64_t first, std::int64_t n) {
    const auto replaced = [&](std::int64_t row) { return row >= first && row < first + n; };
    restoring_ = true;
    if (exact_) exact_->forget(first, n);
    std::erase_if(pending_, [&](const Pending& p) { return replaced(p.row); });
    std::erase_if(waiting_, [&](const Waiting& w) { return replaced(w.row); });
    if (mus_.size() > CellPositions::kMaxOffsets) mus_.clear();
}

// What the rows are; offsets that they tell all of are known from here on.
std::vector<RowSnapshot> KvTensor::classify(std::int64_t n, RowReader& in) {
    std::vector<RowSnapshot> rows;
    rows.reserve(n);
    for (std::int64_t i = 0; i < n; i++) rows.push_back(in.read(i));
    std::uint32_t last = 0;
    for (const RowSnapshot& s : rows) {
        if (s.kind != RowKind::codes || s.mu_hash == last) continue;
        last = s.mu_hash;
        if (mus_.contains(last)) continue;
        if (const std::span<const std::uint16_t> mu = in.mu(last); mu.size() == layout().n_embd()) mus_[last].assign(mu.begin(), mu.end());
    }
    return rows;
}

void KvTensor::place(std::int64_t row, const RowSnapshot& s, CellPositions& cells, KnownOffset& last) {
    const std::uint32_t hash = s.mu_hash;
    if (s.pos < 0 || s.pos >= CellPositions::kMaxPosition) {  // random bytes that look like a position
        cells.forget(row);
        return;
    }
    const bool same = hash && hash == last.mu_hash;
    int known = same ? last.id : -1;
    for (int id = 0; hash && !same && id < CellPositions::kMaxOffsets; id++) {
        offset_->begin(id, cells.generation(id));
        if (offset_->mu_hash(id) == hash && !cells.lost(id)) known = id;
    }
    if (known >= 0) last = {hash, known};  // the next row's is mostly the same
    const auto name = hash ? std::pair(-1, hash) : std::pair(s.sequence, 0u);
    const int id = cells.restore(row, s.pos, name, known);
    offset_->begin(id, cells.generation(id));
}

const std::vector<std::uint16_t>* KvTensor::known_mu(std::uint32_t hash) const {
    if (const auto told = mus_.find(hash); told != mus_.end()) return &told->second;
    return offset_->recall(hash);
}

// An id that is new here takes over the offset of the state it restores, at once or when all of it has come.
void KvTensor::adopt_offset(int id, const RowSnapshot& s) {
    const bool is_new = !offset_->frozen(id) && !offset_->keeps_any(id);
    if (!is_new && !(offset_->expected(id) && offset_->mu_hash(id) == s.mu_hash)) return;
    if (const std::vector<std::uint16_t>* mu = known_mu(s.mu_hash))
        offset_->freeze(id, *mu);
    else if (is_new && *s.form == form())
        offset_->expect(id, s.mu_hash);
}

// Rows of this very format, with what is removed from this cell's sequence, go back bit for bit; not those with a residual into a cache with
// windows of fp16, which has their values, and codes of these.
bool KvTensor::copies(const RowSnapshot& s, std::int64_t row, const CellPositions& cells) {
    const int id = offset_ && cells.at(row) >= 0 ? cells.offset_id(row) : -1;
    if (id >= 0 && s.mu_hash) adopt_offset(id, s);
    if (!s.residual.empty() && exact_ && !has_residuals()) return false;
    return *s.form == form() && s.mu_hash == (id >= 0 ? offset_->mu_hash(id) : 0);
}

// Why these codes are lost, or ok.
RestoreResult KvTensor::refusal(const RowSnapshot& s) const {
    if (!scales_finite(s)) return RestoreResult::damaged;
    if (s.form->scale_hash && (!offset_ || offset_->scale_hash() != s.form->scale_hash)) return RestoreResult::scales_differ;
    if (s.mu_hash && !offset_) return RestoreResult::offset_missing;
    return RestoreResult::ok;
}

// Codes that cannot be copied are decoded, and encoded.
RestoreResult KvTensor::restore_codes(StoreContext& ctx, std::int64_t row, const RowSnapshot& s, const CellPositions& cells,
                                      Decoded& decoded) {
    const bool copy = copies(s, row, cells);  // takes over the offset of a damaged row, too: none is to be measured on it
    const RestoreResult result = refusal(s);
    if (result != RestoreResult::ok) {
        decoded.add_zeros(row, layout().n_embd());
        return result;
    }
    if (copy) {
        store_->rows_in(ctx, row, 1, s.codes.data(), s.codes.size());
        put_residual(row, s, cells);
        return result;
    }
    const std::vector<std::uint16_t>* mu = s.mu_hash ? known_mu(s.mu_hash) : nullptr;
    if (s.mu_hash && !mu) {
        waiting_.push_back({row, *s.form, {s.codes.begin(), s.codes.end()}, {s.residual.begin(), s.residual.end()}, s});
        return result;
    }
    std::vector<float> x(layout().n_embd());
    decode_codes(s, x);
    if (s.mu_hash || s.form->scale_hash) {
        KeyOffset other(n_head(), head_dim());
        if (offset_->has_rope()) other.set_rope(offset_->rope());
        if (s.form->scale_hash) other.set_scales(offset_->scale_letters());
        other.begin(0, 0);
        if (mu) other.freeze(0, *mu);
        other.add_offset(0, x, s.mu_hash ? s.pos : -1);
    }
    if (!s.residual.empty() && exact_ && !has_residuals()) {
        // As a row that is written: the values that are kept, and codes of these.
        round_row(g_.side, x);
        put_values(row, x, cells, decoded);
    } else {
        const bool window = !s.residual.empty() && has_residuals() && cells.at(row) >= 0;
        std::ranges::copy(x, decoded.add_zeros(row, x.size(), window ? exact_->put(row) : -1).begin());
    }
    return result;
}

// What codes that were copied leave.
void KvTensor::put_residual(std::int64_t row, const RowSnapshot& s, const CellPositions& cells) {
    if (!s.residual.empty() && has_residuals() && cells.at(row) >= 0) store_->residual_in(exact_->put(row), s.residual);
}

// Keeps a row exactly, if there are windows; which of them it is in end_batch() finds. Returns the slot that is to take its residual when it is
// encoded, or -1.
std::int32_t KvTensor::put_exact(std::int64_t row, std::span<const float> x, const CellPositions& cells) {
    const std::int32_t slot = exact_ && cells.at(row) >= 0 ? exact_->put(row) : -1;
    if (slot < 0 || has_residuals()) return slot;
    std::vector<std::uint16_t> values(x.size());
    std::ranges::transform(x, values.begin(), to_half);
    store_->exact_in(slot, values.data());
    return -1;
}

// A row of values: kept exactly, and encoded.
void KvTensor::put_values(std::int64_t row, std::span<const float> x, const CellPositions& cells, Decoded& decoded) {
    const std::int32_t slot = put_exact(row, x, cells);
    std::ranges::copy(x, decoded.add_zeros(row, x.size(), slot).begin());
}

RestoreResult KvTensor::restore_values(std::int64_t row, const RowSnapshot& s, const CellPositions& cells, Decoded& decoded) {
    std::vector<std::uint16_t> values(s.values.begin(), s.values.end());
    if (exact_ && g_.side == Side::key) clear_tag(values);  // as keys are rounded that are written
    std::vector<float> x(g_.n_embd);
    const RestoreResult result = decode_values(values, x) ? RestoreResult::ok : RestoreResult::damaged;
    if (exact_ && offset_ && cells.at(row) >= 0 && s.kind == RowKind::exact && !offset_->frozen(cells.offset_id(row))) {
        put_exact(row, x, cells);  // at once, as rows that do not wait: a GPU sums in the order of slots
        pending_.push_back({row, std::move(x)});
    } else {
        put_values(row, x, cells, decoded);
    }
    return result;
}

// `last`: no more rows come; those that still wait are lost.
RestoreResult KvTensor::retry_waiting(StoreContext& ctx, const CellPositions& cells, bool last, Decoded& decoded) {
    RestoreResult result = RestoreResult::ok;
    const std::vector<Waiting> waiting = std::exchange(waiting_, {});
    for (const Waiting& w : waiting) {
        RowSnapshot s = w.snapshot;
        s.form = &w.form, s.codes = w.codes, s.residual = w.residual;
        result = worse(result, restore_codes(ctx, w.row, s, cells, decoded));
    }
    if (!last || waiting_.empty()) return result;
    for (const Waiting& w : waiting_) decoded.add_zeros(w.row, layout().n_embd());
    waiting_.clear();
    return RestoreResult::offset_missing;
}

bool KvTensor::encode_decoded(StoreContext& ctx, const Decoded& decoded, const CellPositions& cells) {
    if (decoded.rows.empty()) return true;
    const StoreRows batch{decoded.x.data(),
                          static_cast<std::size_t>(g_.n_embd),
                          decoded.rows,
                          {},
                          has_residuals() ? std::span<const std::int32_t>(decoded.slots) : std::span<const std::int32_t>(),
                          true};
    return offset_ ? encode_keys(ctx, batch, cells) : encode_rows(ctx, batch);
}

RestoreResult KvTensor::restore_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, RowReader& in, CellPositions& cells,
                                     bool places) {
    begin_restore(first, n);
    const std::vector<RowSnapshot> rows = classify(n, in);
    KnownOffset last;
    for (std::int64_t i = 0; offset_ && places && i < n; i++) place(first + i, rows[i], cells, last);

    const std::vector<std::uint8_t> sound = sound_codes(*ctx.executor, rows);
    RestoreResult result = RestoreResult::ok;
    Decoded decoded;
    const auto copied = [&](std::int64_t i) {
        const std::int64_t row = first + i;
        if (offset_ && cells.at(row) >= 0) offset_->begin(cells.offset_id(row), cells.generation(cells.offset_id(row)));
        return sound[i] && copies(rows[i], row, cells);
    };
    for (std::int64_t i = 0, end; i < n; i = end) {
        for (end = i; end < n && copied(end);) end++;
        if (end > i) {  // a run of rows: all have the same form
            store_->rows_in(ctx, first + i, end - i, rows[i].codes.data(), in.stride());
            for (std::int64_t k = i; k < end; k++) put_residual(first + k, rows[k], cells);
            continue;
        }
        result = worse(result, rows[i].kind == RowKind::codes ? restore_codes(ctx, first + i, rows[i], cells, decoded)
                                                              : restore_values(first + i, rows[i], cells, decoded));
        end++;
    }
    result = worse(result, retry_waiting(ctx, cells, false, decoded));
    encode_pending(ctx, cells, false);
    return encode_decoded(ctx, decoded, cells) ? result : worse(result, RestoreResult::damaged);
}

RestoreResult KvTensor::finish_restore(StoreContext& ctx, CellPositions& cells) {
    if (!std::exchange(restoring_, false)) return RestoreResult::ok;
    encode_pending(ctx, cells, true);
    Decoded decoded;
    RestoreResult result = waiting_.empty() ? RestoreResult::ok : retry_waiting(ctx, cells, true, decoded);
    encode_decoded(ctx, decoded, cells);
    for (int id = 0; offset_ && id < CellPositions::kMaxOffsets; id++) {
        offset_->begin(id, cells.generation(id));
        if (!offset_->expected(id)) continue;
        lose_offset(ctx, id, cells);
        result = RestoreResult::offset_missing;
    }
    return result;
}

// What was removed from these keys will never be known: they become zero, and so does what is removed from later ones.
void KvTensor::lose_offset(StoreContext& ctx, int id, CellPositions& cells) {
    const std::vector<std::uint8_t> zero(layout().row_bytes());
    for (std::int64_t row = 0; row < static_cast<std::int64_t>(cells.size()); row++)
        if (cells.at(row) >= 0 && cells.offset_id(row) == id) {
            store_->rows_in(ctx, row, 1, zero.data(), zero.size());
            if (has_residuals()) exact_->forget(row, 1);
        }
    offset_->freeze(id, std::vector<std::uint16_t>(g_.n_embd));
    cells.lose(id);
}

// Those whose offset is known by now; with `measure` all of them.
void KvTensor::encode_pending(StoreContext& ctx, const CellPositions& cells, bool measure) {
    if (pending_.empty()) return;
    std::vector<Pending> ready;
    std::erase_if(pending_, [&](Pending& p) {
        const int id = cells.at(p.row) >= 0 ? cells.offset_id(p.row) : -1;
        const bool now = id < 0 || measure || (offset_->frozen(id) && !offset_->expected(id));
        if (now) ready.push_back(std::move(p));
        return now;
    });
    // In the order in which they came where positions are equal: what is measured must not differ in its last bit.
    std::ranges::stable_sort(ready, {}, [&](const Pending& p) { return std::pair(cells.offset_id(p.row), cells.at(p.row)); });
    Decoded decoded;
    for (const Pending& p : ready) {
        const std::int32_t slot = has_residuals() ? exact_->find(p.row) : -1;
        std::ranges::copy(p.x, decoded.add_zeros(p.row, p.x.size(), slot).begin());
    }
    encode_decoded(ctx, decoded, cells);
}

}  // namespace turboquant
