// Saving and restoring rows (saved_row.h).
#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_row.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/kernels/executor.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant {
namespace {

/// Adds what a packed row holds, decoded, to x (n_embd values in the model's space, without the removed offset).
void decode_packed(std::span<const std::uint16_t> row, const PackedHeader& h, std::span<float> x) {
    const std::uint8_t* codes = packed_codes(row, h).data();
    std::vector<std::uint8_t> tile;
    for (int head = 0; head * h.head_dim < static_cast<int>(x.size()); codes += h.head_bytes(head), head++) {
        const TileShape shape{h.codecs.of(head), Side::key, h.head_dim};
        const auto out = x.subspan(static_cast<std::size_t>(head) * h.head_dim, h.head_dim);
        tile.assign(tile_bytes(shape), 0);
        tile_set_row(shape, tile.data(), 0, codes);
        tile_decode_rotated(shape, tile.data(), 0, out);
        rotation_for(h.head_dim).inverse(out);
    }
}

/// False for a damaged row: the scale at the end of a head's codes is infinite or NaN.
bool scales_finite(std::span<const std::uint16_t> row, const PackedHeader& h) {
    const std::span<const std::uint8_t> codes = packed_codes(row, h);
    std::size_t end = 0;
    for (int head = 0; end < codes.size(); head++)
        if (end += h.head_bytes(head); (codes[end - 1] & 0x7c) == 0x7c) return false;
    return true;
}

/// Plain fp16 values; false if one is not finite, then all are zero.
bool decode_plain(std::span<const std::uint16_t> row, std::span<float> x) {
    std::transform(row.begin(), row.end(), x.begin(), from_half);
    const bool finite = std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
    if (!finite) std::fill(x.begin(), x.end(), 0.0f);
    return finite;
}

}  // namespace

std::optional<std::vector<float>> KvTensor::exact_row(std::int64_t row) const {
    const std::int32_t slot = exact_->find(row);
    if (slot < 0) return std::nullopt;
    std::vector<std::uint16_t> halves(layout().n_embd());
    store_->exact_out(slot, halves.data());
    std::vector<float> x(halves.size());
    std::transform(halves.begin(), halves.end(), x.begin(), from_half);
    return x;
}

void KvTensor::read_row(std::int64_t row, const CellPositions& cells, std::span<float> x) const {
    SerialExecutor executor;
    StoreContext ctx{&executor};
    store_->read(ctx, row, 1, x.data());
    give_back(row, cells, x);
}

void KvTensor::give_back(std::int64_t row, const CellPositions& cells, std::span<float> x) const {
    if (offset_) offset_->give_back(cells.at(row) >= 0 ? cells.offset_id(row) : 0, x, cells.at(row));
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
            for (std::int64_t row = begin; row < end; row++) give_back(row, cells, {x.data() + (row - begin) * n_embd, n_embd});
            to_halves(kernels(), x.data(), (end - begin) * n_embd, out + (begin - first) * n_embd);
        }
    });
    if (!exact_) return;
    for (std::size_t s = 0; s < exact_->slots().size(); s++)
        if (const std::int64_t row = exact_->slots()[s]; row >= first && row < first + n)
            store_->exact_out(static_cast<std::int32_t>(s), out + (row - first) * n_embd);
}

void KvTensor::save_row(std::int64_t row, CellPositions& cells, std::span<std::uint16_t> out) const {
    SerialExecutor executor;
    StoreContext ctx{&executor};
    save_rows(ctx, row, 1, cells, out.data());
}

// Rows that are saved as fp16 values whatever the format; false: as the store has them.
bool KvTensor::save_kept(std::int64_t row, CellPositions& cells, std::span<std::uint16_t> out) const {
    if (const KeptRow* kept = first_.find(row)) {
        std::copy(kept->values.begin(), kept->values.end(), out.begin());
        return true;
    }
    const int id = cells.offset_id(row);
    const std::int32_t pos = offset_ ? cells.at(row) : -1;
    if (const KeptRow* kept = pos >= 0 && !offset_->frozen(id) ? offset_->find_kept(id, row, pos) : nullptr) {
        std::copy(kept->values.begin(), kept->values.end(), out.begin());
        tag_keys(out, pos, cells.save_order().name(id));
        return true;
    }
    if (!exact_ || (offset_ && (pos < 0 || !offset_->frozen(id) || out.size() < kTagValues))) return false;
    const std::int32_t slot = exact_->find(row);
    if (slot < 0) return false;
    store_->exact_out(slot, out.data());
    if (offset_) tag_exact_keys(out, pos, offset_->mu_hash(id));
    return true;
}

// As the store has them: packed, or their values where the format is one of plain values.
void KvTensor::save_stored(StoreContext& ctx, std::int64_t first, std::int64_t n, CellPositions& cells, std::uint16_t* out) const {
    const auto n_embd = static_cast<std::size_t>(g_.n_embd);
    if (g_.codecs.of(0) == CodecId::raw && !g_.codecs.mixed())
        return store_->rows_out(ctx, first, n, reinterpret_cast<std::uint8_t*>(out), 2 * n_embd);
    if (!codec_info(g_.codecs.of(0)).rotated) {
        std::vector<float> x(n * n_embd);
        store_->read(ctx, first, n, x.data());
        return to_halves(kernels(), x.data(), x.size(), out);
    }
    std::map<int, std::vector<std::uint16_t>> mus;
    PackedHeader header{g_.codecs, head_dim(), -1, 0, offset_ ? offset_->scale_hash() : 0};
    std::uint8_t* codes = nullptr;
    for (std::int64_t i = 0; i < n; i++) {
        std::span<const std::uint16_t> mu;
        header.pos = offset_ ? cells.at(first + i) : -1;
        header.mu_hash = 0;
        if (header.pos >= 0) {
            const int id = cells.offset_id(first + i);
            std::vector<std::uint16_t>& known = mus[id];
            if (known.empty()) known = offset_->mu_halves(id);
            mu = known;
            header.mu_hash = offset_->frozen(id) ? offset_->mu_hash(id) : hash_mu(mu);
            header.piece = cells.save_order().number(first + i, id);
        }
        std::uint8_t* at = pack_row({out + i * n_embd, n_embd}, header, mu).data();
        if (i == 0) codes = at;
    }
    store_->rows_out(ctx, first, n, codes, 2 * n_embd);
}

void KvTensor::save_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, CellPositions& cells, std::uint16_t* out) const {
    const auto n_embd = static_cast<std::size_t>(g_.n_embd);
    cells.save_order().begin(this, first);
    std::int64_t stored = 0;  // rows before i that are still to be saved
    for (std::int64_t i = 0; i < n; i++) {
        if (!save_kept(first + i, cells, {out + i * n_embd, n_embd})) {
            stored++;
            continue;
        }
        if (stored) save_stored(ctx, first + i - stored, stored, cells, out + (i - stored) * n_embd);
        stored = 0;
    }
    if (stored) save_stored(ctx, first + n - stored, stored, cells, out + (n - stored) * n_embd);
}

void KvTensor::place_restored(std::int64_t row, const PackedHeader* packed, const KeyTag& tag, CellPositions& cells, KnownOffset& last) {
    const std::int32_t pos = packed ? (packed->mu_hash ? packed->pos : -1) : tag.pos;
    const std::uint32_t hash = packed ? packed->mu_hash : tag.mu_hash;
    if (pos < 0 || pos >= CellPositions::kMaxPosition) {  // random bytes that look like a position
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
    const auto name = hash ? std::pair(-1, hash) : std::pair(tag.offset_id, 0u);
    const int id = cells.restore(row, pos, name, known);
    offset_->begin(id, cells.generation(id));
}

bool KvTensor::same_form(const PackedHeader& h) const {
    return h.codecs == g_.codecs && h.head_dim == head_dim() && h.scale_hash == (offset_ ? offset_->scale_hash() : 0);
}

std::optional<std::vector<std::uint16_t>> KvTensor::known_mu(std::uint32_t hash) const {
    if (const auto pieces = pieces_.find(hash); pieces != pieces_.end())
        if (auto mu = pieces->second.complete()) return mu;
    const std::vector<std::uint16_t>* mu = offset_->recall(hash);
    return mu ? std::optional(*mu) : std::nullopt;
}

// An id that is new here takes over the offset of the state it restores, at once or when all of it has come.
void KvTensor::adopt_offset(int id, const PackedHeader& h) {
    const bool is_new = !offset_->frozen(id) && offset_->kept(id).empty();
    if (!is_new && !(offset_->expected(id) && offset_->mu_hash(id) == h.mu_hash)) return;
    if (const auto mu = known_mu(h.mu_hash))
        offset_->freeze(id, *mu);
    else if (is_new && same_form(h))
        offset_->expect(id, h.mu_hash);
}

// Rows of this very format, with what is removed from this cell's sequence, go back bit for bit.
bool KvTensor::copies(const PackedHeader& h, std::int64_t row, const CellPositions& cells) {
    const int id = offset_ && cells.at(row) >= 0 ? cells.offset_id(row) : -1;
    if (id >= 0 && h.mu_hash) adopt_offset(id, h);
    return same_form(h) && h.mu_hash == (id >= 0 ? offset_->mu_hash(id) : 0);
}

// The others are decoded and encoded.
RestoreResult KvTensor::restore_packed(StoreContext& ctx, std::int64_t row, SavedRow saved, const PackedHeader& h,
                                       const CellPositions& cells, Decoded& decoded) {
    const std::size_t row_bytes = 2 * saved.size();
    const bool copy = copies(h, row, cells);  // takes over the offset of a damaged row, too: none is to be measured on it
    RestoreResult result = RestoreResult::ok;
    if (!scales_finite(saved, h))
        result = RestoreResult::damaged;
    else if (h.scale_hash && (!offset_ || offset_->scale_hash() != h.scale_hash))
        result = RestoreResult::scales_differ;
    else if (h.mu_hash && !offset_)
        result = RestoreResult::offset_missing;
    std::vector<float> x(g_.n_embd);
    if (result == RestoreResult::ok) {
        if (copy) {
            store_->rows_in(ctx, row, 1, packed_codes(saved, h).data(), row_bytes);
            return result;
        }
        const auto mu = h.mu_hash ? known_mu(h.mu_hash) : std::nullopt;
        if (h.mu_hash && !mu) {
            waiting_.push_back({row, {saved.begin(), saved.end()}});
            return result;
        }
        decode_packed(saved, h, x);
        if (h.mu_hash || h.scale_hash) {
            KeyOffset other(n_head(), head_dim());
            if (offset_->has_rope()) other.set_rope(offset_->rope());
            if (h.scale_hash) other.set_scales(offset_->scale_letters());
            other.begin(0, 0);
            if (mu) other.freeze(0, *mu);
            other.give_back(0, x, h.mu_hash ? h.pos : -1);
        }
    }
    decoded.rows.push_back(row);
    decoded.x.insert(decoded.x.end(), x.begin(), x.end());
    return result;
}

RestoreResult KvTensor::restore_plain(std::int64_t row, SavedRow saved, const CellPositions& cells, Decoded& decoded) {
    std::vector<std::uint16_t> values(saved.begin(), saved.end());
    if (exact_ && g_.side == Side::key) clear_tag(values);
    std::vector<float> x(g_.n_embd);
    const RestoreResult result = decode_plain(values, x) ? RestoreResult::ok : RestoreResult::damaged;
    if (exact_ && cells.at(row) >= 0) {
        std::transform(x.begin(), x.end(), values.begin(), to_half);
        store_->exact_in(exact_->put(row), values.data());
        if (offset_ && read_tag(saved).mu_hash && !offset_->frozen(cells.offset_id(row))) {
            pending_.push_back(row);
            return result;
        }
    }
    decoded.rows.push_back(row);
    decoded.x.insert(decoded.x.end(), x.begin(), x.end());
    return result;
}

// `last`: no more rows come; those that still wait are lost.
RestoreResult KvTensor::retry_waiting(StoreContext& ctx, const CellPositions& cells, bool last, Decoded& decoded) {
    RestoreResult result = RestoreResult::ok;
    const std::vector<Waiting> waiting = std::exchange(waiting_, {});
    for (const Waiting& w : waiting) result = worse(result, restore_packed(ctx, w.row, w.saved, *packed_header(w.saved), cells, decoded));
    if (!last || waiting_.empty()) return result;
    for (const Waiting& w : waiting_) {
        decoded.rows.push_back(w.row);
        decoded.x.resize(decoded.rows.size() * g_.n_embd);
    }
    waiting_.clear();
    return RestoreResult::offset_missing;
}

bool KvTensor::encode_decoded(StoreContext& ctx, const Decoded& decoded, const CellPositions& cells) {
    if (decoded.rows.empty()) return true;
    const StoreRows batch{decoded.x.data(), static_cast<std::size_t>(g_.n_embd), decoded.rows, {}, {}, true};
    return offset_ ? encode_keys(ctx, batch, cells) : encode_rows(ctx, batch);
}

RestoreResult KvTensor::restore_rows(StoreContext& ctx, std::int64_t first, std::int64_t n, const std::uint16_t* in, CellPositions& cells,
                                     bool places) {
    const auto replaced = [&](std::int64_t row) { return row >= first && row < first + n; };
    restoring_ = true;
    if (exact_) exact_->forget(first, n);
    std::erase_if(pending_, replaced);
    std::erase_if(waiting_, [&](const Waiting& w) { return replaced(w.row); });
    if (pieces_.size() > CellPositions::kMaxOffsets) pieces_.clear();

    const std::size_t n_embd = g_.n_embd;
    const auto saved = [&](std::int64_t i) { return SavedRow(in + i * n_embd, n_embd); };
    std::vector<std::optional<PackedHeader>> headers(n);
    std::uint32_t known = 0;
    KnownOffset last;
    for (std::int64_t i = 0; i < n; i++) {
        headers[i] = packed_header(saved(i));
        if (headers[i] && headers[i]->mu_hash) restore_offset(saved(i), *headers[i], known);
        if (offset_ && places)
            place_restored(first + i, headers[i] ? &*headers[i] : nullptr, headers[i] ? KeyTag{} : read_tag(saved(i)), cells, last);
    }
    RestoreResult result = RestoreResult::ok;
    Decoded decoded;
    const auto copied = [&](std::int64_t i) {
        return headers[i] && scales_finite(saved(i), *headers[i]) && copies(*headers[i], first + i, cells);
    };
    for (std::int64_t i = 0, end; i < n; i = end) {
        for (end = i; end < n; end++) {
            const std::int64_t row = first + end;
            if (offset_ && cells.at(row) >= 0) offset_->begin(cells.offset_id(row), cells.generation(cells.offset_id(row)));
            if (!copied(end)) break;
        }
        if (end > i) {  // a run of rows: all have the same form
            store_->rows_in(ctx, first + i, end - i, packed_codes(saved(i), *headers[i]).data(), 2 * n_embd);
            continue;
        }
        result = worse(result, headers[i] ? restore_packed(ctx, first + i, saved(i), *headers[i], cells, decoded)
                                          : restore_plain(first + i, saved(i), cells, decoded));
        end++;
    }
    result = worse(result, retry_waiting(ctx, cells, false, decoded));
    encode_pending(ctx, cells, false);
    return encode_decoded(ctx, decoded, cells) ? result : worse(result, RestoreResult::damaged);
}

// `known`: the offset that the rows before this one were found to be complete with.
void KvTensor::restore_offset(SavedRow saved, const PackedHeader& h, std::uint32_t& known) {
    if (h.mu_hash == known) return;
    MuPieces& pieces = pieces_.try_emplace(h.mu_hash, saved.size()).first->second;
    pieces.add(saved, h);
    if (pieces.complete()) known = h.mu_hash;
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
        if (cells.at(row) >= 0 && cells.offset_id(row) == id) store_->rows_in(ctx, row, 1, zero.data(), zero.size());
    offset_->freeze(id, std::vector<std::uint16_t>(g_.n_embd));
    cells.lose(id);
}

// Those whose offset is known by now; with `measure` all of them.
void KvTensor::encode_pending(StoreContext& ctx, const CellPositions& cells, bool measure) {
    if (pending_.empty()) return;
    std::vector<std::int64_t> rows, later;
    for (const std::int64_t row : pending_) {
        const int id = cells.at(row) >= 0 ? cells.offset_id(row) : -1;
        const bool ready = id < 0 || measure || (offset_->frozen(id) && !offset_->expected(id));
        (ready ? rows : later).push_back(row);
    }
    pending_ = later;
    // In the order in which they came where positions are equal: what is measured must not differ in its last bit.
    std::stable_sort(rows.begin(), rows.end(), [&](std::int64_t a, std::int64_t b) {
        return std::pair(cells.offset_id(a), cells.at(a)) < std::pair(cells.offset_id(b), cells.at(b));
    });
    std::vector<float> x;
    std::erase_if(rows, [&](std::int64_t row) {
        const auto keys = exact_row(row);
        if (keys) x.insert(x.end(), keys->begin(), keys->end());
        return !keys;
    });
    if (!rows.empty()) encode_keys(ctx, {x.data(), layout().n_embd(), rows, {}, {}, true}, cells);
}

}  // namespace turboquant
