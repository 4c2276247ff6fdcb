#include "turboquant/cache/kv_tensor.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

/// Kept rows, as floats, for the encoder.
struct Unpacked {
    std::vector<std::int64_t> rows;
    std::vector<float> x;

    void add(const KeptRow& r) {
        rows.push_back(r.row);
        for (const std::uint16_t h : r.values) x.push_back(from_half(h));
    }
    StoreRows batch(std::size_t n_embd) const { return {x.data(), n_embd, rows, {}, {}, true}; }
};

}  // namespace

void KvTensor::bind_head_dim(int head_dim) {
    if (head_dim == this->head_dim()) return;
    if (bound())
        throw std::invalid_argument("head size changed from " + std::to_string(this->head_dim()) + " to " + std::to_string(head_dim));
    Layout layout(g_, head_dim);
    if (has_outliers(g_.codecs.of(0))) {
        outliers_ = std::make_unique<OutlierChannels>(g_.codecs.of(0), layout.n_head(), head_dim, g_.outlier_ratio);
        layout.set_n_outliers(outliers_->count());
    }
    store_ = make_store_(layout);
    if (outliers_) store_->set_outliers(outliers_->count(), outliers_->mask(), {});
    if (!g_.windows.any()) return;
    if (g_.windows.residual() && !store_->takes_residuals()) {
        store_.reset();
        throw std::invalid_argument("this device keeps exact windows in fp16 only; write recent=N instead of recent=N:4");
    }
    exact_ = std::make_unique<ExactRows>(g_.windows, layout.window_row_bytes(), g_.n_cells, g_.n_streams, store_->spare_exact_slots());
}

std::size_t KvTensor::format_bytes() const {
    if (!bound()) return 0;
    return layout().bytes() + (exact_ ? exact_->full_bytes() : 0) + offset_bytes();
}

std::size_t KvTensor::offset_bytes() const {
    return offset_ ? static_cast<std::size_t>(g_.n_embd) * (sizeof(std::uint16_t) * g_.n_streams + offset_->scaled()) : 0;
}

bool KvTensor::encode_first_rows(StoreContext& ctx) {
    Unpacked first;
    for (const KeptRow& r : first_.rows()) first.add(r);
    return store_->write(ctx, first.batch(layout().n_embd()), nullptr);
}

void KvTensor::measure() {
    Unpacked first;
    for (const KeptRow& r : first_.rows()) first.add(r);
    outliers_->measure(first.x);
    store_->set_outliers(outliers_->count(), outliers_->mask(), first.rows);
}

void KvTensor::freeze() {
    if (offset_) offset_->freeze_all();
    if (outliers_ && !first_.rows().empty()) outliers_->freeze();
    first_.clear();
}

void KvTensor::reset() {
    if (!bound()) return;
    store_->clear();
    if (offset_) offset_->reset();
    if (outliers_) {
        outliers_->reset();
        store_->set_outliers(outliers_->count(), outliers_->mask(), {});
    }
    first_.clear();
    mus_.clear();
    pending_.clear();
    waiting_.clear();
    if (exact_) exact_->clear();
}

bool KvTensor::write(StoreContext& ctx, StoreRows batch, const CellPositions& cells, bool remove_offset) {
    if (exact_) {
        exact_->kept_by_batch(batch.rows, cells, rounded_);
        exact_->add(batch.rows, cells, exact_slots_);
        batch.exact_slots = exact_slots_;
        if (!has_residuals()) batch.rounded = rounded_, batch.seen_exactly = std::ranges::find(rounded_, 0) == rounded_.end();
    }
    const bool finite = remove_offset ? encode_keys(ctx, batch, cells) : encode_rows(ctx, batch);
    for (std::size_t i = 0; exact_ && !finite && i < batch.rows.size(); i++) exact_->forget(batch.rows[i], 1);
    return finite;
}

void KvTensor::end_batch(StoreContext& ctx, const CellPositions& cells) {
    if (!exact_) return;
    const std::span<const SlotMove> moves = exact_->trim(cells);
    store_->move_exact(ctx, moves, exact_->slots().size());
}

void KvTensor::make_way(StoreContext& ctx, std::span<const std::int64_t> rows, const CellPositions& cells) {
    if (exact_) exact_->make_way(rows, cells);
    end_batch(ctx, cells);
}

void KvTensor::pair_exact(StoreContext& ctx, const ExactRows& other) {
    const std::size_t before = exact_->slots().size();
    const ExactRows::Arrangement moves = exact_->arrange(other.slots());
    store_->move_exact(ctx, moves.out, std::max(before, exact_->slots().size()) + moves.out.size());
    store_->move_exact(ctx, moves.in, exact_->slots().size());
}

bool KvTensor::encode_rows(StoreContext& ctx, StoreRows batch) {
    const bool was_measuring = measuring();
    if (was_measuring) {
        batch = round_rows(g_.side, layout().n_embd(), batch, rounded_rows_);
        first_.add(batch.x, batch.stride, layout().n_embd(), batch.rows);
        measure();
    }
    bool finite = store_->write(ctx, batch, nullptr);
    if (was_measuring) {
        finite = encode_first_rows(ctx) && finite;
        if (first_.enough()) freeze();
    }
    return finite;
}

// All kept rows, or those among `only` (if it is not empty).
bool KvTensor::encode_kept(StoreContext& ctx, int id, const CellPositions& cells, std::span<const std::int64_t> only) {
    const std::span<const KeptRow> aside = offset_->kept_aside(id);
    Unpacked kept;
    std::vector<std::int32_t> places;
    for (const KeptRow& r : aside.empty() ? offset_->kept(id) : aside) {
        if (cells.at(r.row) != r.pos || cells.offset_id(r.row) != id) continue;  // the cell holds another token by now
        if (!only.empty() && std::find(only.begin(), only.end(), r.row) == only.end()) continue;
        kept.add(r);
        if (!aside.empty()) places.push_back(r.place);
    }
    const KeyTransform transform = offset_->transform(cells);
    StoreRows batch = kept.batch(layout().n_embd());
    std::vector<std::int32_t> slots;  // residuals change with the codes that they stand on
    for (std::size_t i = 0; has_residuals() && i < kept.rows.size(); i++) slots.push_back(exact_->find(kept.rows[i]));
    batch.exact_slots = slots;
    batch.on_host = aside.empty(), batch.aside = places;
    const bool finite = store_->write(ctx, batch, &transform);
    offset_->release_kept(id);
    return finite;
}

/// The store measures an offset on the rows that it has aside. False: there is nothing to measure, or the host has to.
bool KvTensor::measure_aside(StoreContext& ctx, int id, const CellPositions& cells) {
    const KeyTransform before = offset_->transform(cells);
    std::size_t n = 0;
    if (!offset_->remeasure_aside(id, n)) return false;
    std::vector<std::int32_t> places, positions;
    for (const KeptRow& r : offset_->kept_aside(id).first(n)) places.push_back(r.place), positions.push_back(r.pos);
    store_->measure(ctx, id, places, positions, before);
    return true;
}

/// Of few rows, which are encoded with the mean of those before them until then: the batch sees them exactly, or is one row.
void KvTensor::remeasure_later(StoreContext& ctx, int id, const CellPositions& cells) {
    if (!offset_->due(id)) return;
    store_->when_free(ctx, [this, &ctx, &cells, id] {
        if (!offset_->frozen(id) && (measure_aside(ctx, id, cells) || offset_->remeasure(id))) encode_kept(ctx, id, cells, {});
    });
}

// Measures offsets on the batch, sequence by sequence: runs of rows with one id, as batches have them.
void KvTensor::observe(StoreContext& ctx, StoreRows& batch, const CellPositions& cells) {
    const std::span<const std::int64_t> rows = batch.rows;
    measured_.clear(), due_.clear(), to_aside_.assign(rows.size(), -1);
    // What this batch's queries read in compressed form has its offset before it is encoded, but for a single row.
    const bool may_wait = (batch.seen_exactly || rows.size() == 1) && rows.size() <= store_->rows_set_aside_by_write();
    for (std::size_t i = 0, end; i < rows.size(); i = end) {
        const int id = cells.offset_id(rows[i]);
        batch_pos_.clear(), batch_beside_.clear();
        for (end = i; end < rows.size() && cells.offset_id(rows[end]) == id && (cells.at(rows[end]) >= 0 || end == i); end++) {
            batch_pos_.push_back(cells.at(rows[end]));
            batch_beside_.push_back(cells.beside(rows[end]));
        }
        offset_->begin(id, cells.generation(id));
        if (batch_pos_[0] < 0 || offset_->frozen(id)) continue;
        const float* x = batch.x + i * batch.stride;
        bool changed;
        if (batch.on_host || store_->inputs_on_host()) {
            changed = offset_->observe(id, x, batch.stride, rows.subspan(i, end - i), batch_pos_, batch_beside_);
        } else {
            offset_->note(id, rows.subspan(i, end - i), batch_pos_, batch_beside_, places_);
            put_places(i);
            // Rows that are not set aside cannot be encoded again: they need the offset that is measured now.
            const bool later = may_wait && std::ranges::find(places_, -1) == places_.end();
            if (later) {
                due_.push_back(id);
            } else {
                store_->set_aside(ctx, batch.x, batch.stride, to_aside_);
                std::ranges::fill(to_aside_, -1);
            }
            changed = !later && (measure_aside(ctx, id, cells) || offset_->remeasure(id));
            // They are encoded from what is kept of them, without the host's seeing them.
            if (batch.rounded.empty()) rounded_.assign(rows.size(), 0), batch.rounded = rounded_;
            for (std::size_t k = i; k < end; k++)
                if (places_[k - i] >= 0) rounded_[k] = 1;
            if (!changed) continue;
        }
        measured_.push_back({id, i, changed ? 0 : end - i});
    }
    if (!due_.empty()) batch.to_aside = to_aside_;
}

/// Places of a run that begins at this row of the batch. One that a run before had is this one's: the sequence was cut back within the batch.
void KvTensor::put_places(std::size_t first) {
    for (std::int32_t& place : to_aside_)
        if (place >= 0 && std::ranges::find(places_, place) != places_.end()) place = -1;
    std::ranges::copy(places_, to_aside_.begin() + static_cast<std::ptrdiff_t>(first));
}

bool KvTensor::encode_keys(StoreContext& ctx, StoreRows batch, const CellPositions& cells) {
    observe(ctx, batch, cells);
    const KeyTransform transform = offset_->transform(cells);
    bool finite = store_->write(ctx, batch, &transform);
    for (const Measured& m : measured_) {
        // Rows that were rounded before they were encoded are what is kept of them.
        const std::span<const std::uint8_t> rounded = batch.rounded.empty() ? batch.rounded : batch.rounded.subspan(m.first, m.n);
        if (m.n > 0 && !rounded.empty() && std::ranges::find(rounded, 0) == rounded.end()) continue;
        finite = encode_kept(ctx, m.id, cells, batch.rows.subspan(m.first, m.n)) && finite;
    }
    for (const int id : due_) remeasure_later(ctx, id, cells);
    return finite;
}

void KvTensor::rotate(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    freeze();  // what was kept for measuring has the old positions
    if (has_residuals()) return rotate_residuals(ctx, rope, shift);
    store_->rotate(ctx, rope, shift);
    if (exact_) rotate_exact(rope, shift);
}

// Rows of windows are rotated with what is kept of them, and both encoded again.
void KvTensor::rotate_residuals(StoreContext& ctx, const RopeParams& rope, std::span<const std::int32_t> shift) {
    const std::size_t d = layout().head_dim(), n_embd = layout().n_embd();
    std::vector<std::int64_t> rows;
    std::vector<std::int32_t> slots, rest(shift.begin(), shift.end());
    for (std::size_t s = 0; s < exact_->slots().size(); s++) {
        const std::int64_t row = exact_->slots()[s];
        if (row < 0 || static_cast<std::size_t>(row) >= shift.size() || shift[row] == 0) continue;
        rows.push_back(row), slots.push_back(static_cast<std::int32_t>(s));
        rest[row] = 0;
    }
    std::vector<float> x(rows.size() * n_embd), table(rope.n_dims);
    store_->read_window(ctx, rows, slots, x.data());
    for (std::size_t i = 0; i < rows.size(); i++) {
        rope_table(rope, static_cast<float>(shift[rows[i]]), table);
        for (int h = 0; h < n_head(); h++) rope_apply(rope, table, std::span(x).subspan(i * n_embd + h * d, d));
    }
    store_->rotate(ctx, rope, rest);
    StoreRows batch{x.data(), n_embd, rows, {}, slots, true};
    store_->write(ctx, batch, nullptr);
}

void KvTensor::rotate_exact(const RopeParams& rope, std::span<const std::int32_t> shift) {
    const std::size_t d = layout().head_dim();
    std::vector<float> table(rope.n_dims), x(layout().n_embd());
    std::vector<std::uint16_t> halves(x.size());
    for (std::size_t s = 0; s < exact_->slots().size(); s++) {
        const std::int64_t row = exact_->slots()[s];
        if (row < 0 || static_cast<std::size_t>(row) >= shift.size() || shift[row] == 0) continue;
        rope_table(rope, static_cast<float>(shift[row]), table);
        store_->exact_out(static_cast<std::int32_t>(s), halves.data());
        std::ranges::transform(halves, x.begin(), from_half);
        for (int h = 0; h < n_head(); h++) rope_apply(rope, table, std::span(x).subspan(h * d, d));
        std::ranges::transform(x, halves.begin(), to_half);
        store_->exact_in(static_cast<std::int32_t>(s), halves.data());
    }
}

void KvTensor::copy_stream(std::int64_t src, std::int64_t dst) {
    if (exact_) {
        SerialExecutor executor;
        StoreContext ctx{&executor};
        const std::span<const SlotMove> copies = exact_->copy_stream(src, dst);
        store_->move_exact(ctx, copies, exact_->slots().size());
    }
    store_->copy_stream(src, dst);
}

}  // namespace turboquant
