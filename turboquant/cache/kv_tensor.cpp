#include "turboquant/cache/kv_tensor.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "turboquant/codec/composite.h"

namespace turboquant {
namespace {

constexpr int kMaxHeadDim = *std::max_element(std::begin(kHeadDims), std::end(kHeadDims));

}  // namespace

std::size_t KvTensor::reserved_bytes(const Geometry& g) {
    const std::int64_t tiles = (g.n_cells + kTileKeys - 1) / kTileKeys * g.n_streams;
    const auto windows = static_cast<std::size_t>(g.windows.bits(g.n_cells, g.n_embd)) / 8 * g.n_streams;
    std::size_t most = 0;
    for (const int d : kHeadDims) {
        if (g.n_embd % d != 0) continue;
        std::size_t heads = 0;
        for (int h = 0; h < g.codecs.count(); h++) heads += tile_bytes({g.codecs.of(h), g.side, d, d / 2});
        if (!g.codecs.mixed()) heads *= g.n_embd / d;
        if (!g.codecs.mixed() || g.n_embd / d == g.codecs.count()) most = std::max(most, tiles * heads);
    }
    return windows + (most ? most : static_cast<std::size_t>(tiles) * kTileKeys * g.n_embd * sizeof(std::uint16_t));
}

void KvTensor::bind_head_dim(int head_dim) {
    if (head_dim == head_dim_) return;
    if (head_dim_) throw std::invalid_argument("head size changed from " + std::to_string(head_dim_) + " to " + std::to_string(head_dim));
    if (!head_dim_supported(head_dim) || g_.n_embd % head_dim) {
        std::string known;
        for (const int d : kHeadDims) known += (known.empty() ? "" : ", ") + std::to_string(d);
        throw std::invalid_argument("head size " + std::to_string(head_dim) + " (row of " + std::to_string(g_.n_embd) +
                                    " values) is not supported; supported: " + known + ". Run this model without a turboquant device");
    }
    if (g_.codecs.mixed() && g_.n_embd / head_dim != g_.codecs.count())
        throw std::invalid_argument("formats for " + std::to_string(g_.codecs.count()) + " KV heads (" + to_string(g_.codecs) +
                                    "), but this layer has " + std::to_string(g_.n_embd / head_dim) +
                                    "; name one format for each, or one for all");
    head_dim_ = head_dim;
    std::size_t at = 0;
    for (int h = 0; g_.codecs.mixed() && h < n_head(); h++) heads_.push_back({g_.codecs.of(h), at}), at += tile_bytes(shape(h));
    if (g_.windows.any()) exact_ = std::make_unique<ExactRows>(g_.windows, g_.side, n_head(), head_dim, g_.n_cells, g_.n_streams);
    if (has_outliers(g_.codecs.of(0))) outliers_ = std::make_unique<OutlierChannels>(g_.codecs.of(0), n_head(), head_dim, g_.outlier_ratio);
}

std::size_t KvTensor::format_bytes() const {
    if (!bound()) return 0;
    return tiles_per_stream() * g_.n_streams * tile_stride() + (exact_ ? exact_->full_bytes() : 0) + offset_bytes();
}

std::size_t KvTensor::offset_bytes() const {
    return offset_ ? static_cast<std::size_t>(g_.n_embd) * (sizeof(std::uint16_t) * g_.n_streams + offset_->scaled()) : 0;
}

std::size_t KvTensor::tile_stride() const {
    return heads_.empty() ? n_head() * tile_bytes(shape()) : heads_.back().at + tile_bytes(shape(n_head() - 1));
}

TileView KvTensor::view(std::int64_t stream) const {
    return {shape(), memory_ + stream * tiles_per_stream() * tile_stride(), tile_bytes(shape()), tile_stride(),
            heads_.empty() ? nullptr : heads_.data()};
}

std::uint8_t* KvTensor::tile(std::int64_t row, int head) const {
    const std::int64_t t = row / g_.n_cells * tiles_per_stream() + row % g_.n_cells / kTileKeys;
    return memory_ + t * tile_stride() + head_at(head);
}

EncodeArgs KvTensor::encode_args(int head, const float* x, std::size_t x_stride, std::span<const std::int64_t> rows,
                                 std::span<std::int64_t> scratch) const {
    for (std::size_t i = 0; i < rows.size(); i++) scratch[i] = rows[i] / g_.n_cells * tiles_per_stream() * kTileKeys + rows[i] % g_.n_cells;
    EncodeArgs args;
    args.shape = shape(head);
    args.tiles = memory_ + head_at(head);
    args.tile_stride = tile_stride();
    args.x = x;
    args.x_stride = x_stride;
    args.cells = scratch.data();
    args.n = static_cast<int>(rows.size());
    args.norm_mode = g_.norm_mode;
    return args;
}

bool KvTensor::encode(const Kernels& k, int head, const float* x, std::size_t x_stride, std::span<const std::int64_t> rows,
                      std::span<std::int64_t> scratch) {
    if (outliers_) set_mask(rows, head);
    return turboquant::encode(k, encode_args(head, x, x_stride, rows, scratch));
}

bool KvTensor::encode_part(const Kernels& k, int ith, int parts, const float* x, std::size_t stride, std::span<const std::int64_t> rows,
                           const CellPositions& cells, std::span<std::int64_t> scratch) {
    constexpr std::size_t kBlock = 32;  // the rotations of so many positions stay in the cache while all heads use them
    std::array<float, kBlock * 2 * kMaxHeadDim> turns;
    std::array<const float*, kBlock> offsets;
    std::array<float, kBlock * kMaxHeadDim> scaled;
    bool finite = true;
    for (std::size_t first = 0; first < rows.size(); first += kBlock) {
        const auto block = rows.subspan(first, std::min(kBlock, rows.size() - first));
        for (std::size_t i = 0; i < block.size(); i++) {
            const std::int32_t pos = cells.at(block[i]);
            offsets[i] = pos >= 0 ? offset_->quarters(cells.offset_id(block[i])) : nullptr;
            if (offsets[i]) offset_->spread_turn(pos, turns.data() + i * 2 * head_dim_);
        }
        for (int h = ith; h < n_head(); h += parts) {
            if (outliers_) set_mask(block, h);
            EncodeArgs args = encode_args(h, x + first * stride + static_cast<std::size_t>(h) * head_dim_, stride, block, scratch);
            if (offset_->scaled()) {
                for (std::size_t i = 0; i < block.size(); i++)
                    std::transform(args.x + i * stride, args.x + i * stride + head_dim_, offset_->scales(h).begin(),
                                   scaled.begin() + static_cast<std::ptrdiff_t>(i * head_dim_), std::multiplies<>());
                args.x = scaled.data(), args.x_stride = head_dim_;
            }
            args.turns = turns.data();
            args.offsets = offsets.data();
            args.offset_at = static_cast<std::size_t>(h) * 2 * head_dim_;
            finite = turboquant::encode(k, args) && finite;
        }
    }
    return finite;
}

void KvTensor::set_mask(std::span<const std::int64_t> rows, int head) {
    const std::uint8_t* last = nullptr;
    for (const std::int64_t row : rows) {
        std::uint8_t* t = tile(row, head);
        if (t != last) composite_set_mask(shape(), t, outliers_->mask(head));
        last = t;
    }
}

void KvTensor::decode_head(std::int64_t row, int head, std::span<float> x) const {
    tile_decode_rotated(shape(head), tile(row, head), slot(row), x);
    if (codec_info(g_.codecs.of(head)).rotated) rotation_for(head_dim_).inverse(x);
}

bool KvTensor::encode_plain(const Kernels& k, const float* x, std::size_t stride, std::span<const std::int64_t> rows) {
    std::vector<std::int64_t> scratch(rows.size());
    bool finite = true;
    for (int h = 0; h < n_head(); h++) finite = encode(k, h, x + h * head_dim_, stride, rows, scratch) && finite;
    return finite;
}

bool KvTensor::encode_first_rows(const Kernels& k) {
    std::vector<std::int64_t> rows;
    std::vector<float> x;
    for (const FirstRows::Row& r : first_.rows()) {
        rows.push_back(r.row);
        for (const std::uint16_t h : r.values) x.push_back(from_half(h));
    }
    return encode_plain(k, x.data(), g_.n_embd, rows);
}

void KvTensor::measure() {
    std::vector<float> x;
    for (const FirstRows::Row& r : first_.rows()) {
        for (const std::uint16_t h : r.values) x.push_back(from_half(h));
        // The layout may change: what was written in the old one, these rows and no others, becomes zero.
        for (int h = 0; h < n_head(); h++) std::fill_n(tile(r.row, h), tile_bytes(shape()), std::uint8_t{0});
    }
    outliers_->measure(x);
}

void KvTensor::freeze() {
    if (offset_) offset_->freeze_all();
    if (outliers_ && !first_.rows().empty()) outliers_->freeze();
    first_.clear();
}

void KvTensor::reset() {
    if (offset_) offset_->reset();
    if (outliers_) outliers_->reset();
    first_.clear();
    pieces_.clear();
    pending_.clear();
    if (exact_) exact_->clear();
}

bool KvTensor::encode_rows(const Kernels& k, const float* values, std::size_t stride, std::span<const std::int64_t> rows) {
    const bool was_measuring = measuring();
    if (was_measuring) {
        first_.add(values, stride, g_.n_embd, rows, std::vector<std::int32_t>(rows.size(), -1), true);
        measure();
    }
    bool finite = encode_plain(k, values, stride, rows);
    if (was_measuring) {
        finite = encode_first_rows(k) && finite;
        if (first_.enough()) freeze();
    }
    return finite;
}

// All kept rows, or those among `only` (if it is not empty).
bool KvTensor::encode_kept(const Kernels& k, int id, const CellPositions& cells, std::span<const std::int64_t> only) {
    std::vector<std::int64_t> rows;
    std::vector<float> x;
    for (const KeyOffset::Row& r : offset_->kept(id)) {
        if (cells.at(r.row) != r.pos || cells.offset_id(r.row) != id) continue;  // the cell holds another token by now
        if (!only.empty() && std::find(only.begin(), only.end(), r.row) == only.end()) continue;
        rows.push_back(r.row);
        for (const std::uint16_t h : r.values) x.push_back(from_half(h));
    }
    std::vector<std::int64_t> scratch(rows.size());
    const bool finite = encode_part(k, 0, 1, x.data(), g_.n_embd, rows, cells, scratch);
    offset_->settle(id);
    return finite;
}

void KvTensor::begin_keys(const float* keys, std::size_t stride, std::span<const std::int64_t> rows, const CellPositions& cells,
                          KeyBatch& batch) {
    // By sequence: runs of rows with one id, as batches have them.
    batch.measured.clear();
    for (std::size_t i = 0, end; i < rows.size(); i = end) {
        const int id = cells.offset_id(rows[i]);
        batch.pos.clear();
        for (end = i; end < rows.size() && cells.offset_id(rows[end]) == id && (cells.at(rows[end]) >= 0 || end == i); end++)
            batch.pos.push_back(cells.at(rows[end]));
        offset_->begin(id, cells.generation(id));
        if (batch.pos[0] < 0 || offset_->frozen(id)) continue;
        const bool changed = offset_->observe(id, keys + i * stride, stride, rows.subspan(i, end - i), batch.pos);
        batch.measured.push_back({id, i, changed ? 0 : end - i});
    }
}

bool KvTensor::end_keys(const Kernels& k, std::span<const std::int64_t> rows, const CellPositions& cells, const KeyBatch& batch) {
    bool finite = true;
    for (const KeyBatch::Measured& m : batch.measured) finite = encode_kept(k, m.id, cells, rows.subspan(m.first, m.n)) && finite;
    return finite;
}

bool KvTensor::encode_keys(const Kernels& k, const float* keys, std::size_t stride, std::span<const std::int64_t> rows,
                           const CellPositions& cells) {
    KeyBatch batch;
    begin_keys(keys, stride, rows, cells, batch);
    std::vector<std::int64_t> scratch(rows.size());
    const bool finite = encode_part(k, 0, 1, keys, stride, rows, cells, scratch);
    return end_keys(k, rows, cells, batch) && finite;
}

void KvTensor::rotate_row(std::int64_t row, const RopeParams& rope, std::span<const float> table) {
    std::array<float, kMaxHeadDim> x;
    for (int h = 0; h < n_head(); h++) {
        decode_head(row, h, std::span(x).first(head_dim_));
        rope_apply(rope, table, std::span(x).first(head_dim_));
        tile_encode(shape(h), tile(row, h), slot(row), std::span<const float>(x).first(head_dim_), g_.norm_mode);
    }
}

void KvTensor::copy_stream(std::int64_t src, std::int64_t dst) {
    if (exact_) exact_->copy_stream(src, dst);
    const std::size_t bytes = tiles_per_stream() * tile_stride();
    if (src != dst) std::memcpy(memory_ + dst * bytes, memory_ + src * bytes, bytes);
}

}  // namespace turboquant
