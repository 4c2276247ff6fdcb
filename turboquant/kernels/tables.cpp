#include "turboquant/kernels/tables.h"

#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/composite.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/trellis.h"
#include "turboquant/kernels/panel.h"

namespace turboquant {
namespace {

void fill_codebook(CodecTables& t) {
    const Codebook& book = codebook_for(t.bits, t.head_dim);
    const int n = 1 << t.bits;
    t.half = n / 2;
    t.lut_step = book.i8_step;
    for (int i = 0; i < 16 && t.i8; ++i) t.lut[i] = book.i8[i % n];
    for (int i = 0; i < n; ++i) t.centroids[i] = book.centroids[i];
    for (int i = 0; i < t.half; ++i) t.levels[i] = book.centroids[t.half + i];
    for (float& b : t.bounds) b = std::numeric_limits<float>::infinity();
    for (int i = 0; i + 1 < t.half; ++i) t.bounds[i] = book.boundaries[t.half + i];
    // Values beyond the last boundary all fall into the last cell, which begins above it.
    t.bins_per_unit = (kEncodeBins - 2) / (t.half > 1 ? t.bounds[t.half - 2] : 1);
    for (int c = 0, k = 0; c < kEncodeBins; ++c) {
        while (k + 1 < t.half && t.bounds[k] * t.bins_per_unit < static_cast<float>(c)) ++k;
        t.bins[c] = static_cast<std::uint8_t>(k);
    }
}

void fill_trellis(CodecTables& t) {
    const TrellisCodebook& book = trellis_for(t.bits, t.head_dim);
    const int n_points = 1 << (t.bits - 1);
    t.trellis = true;
    t.lut_step = book.i8_step;
    t.trellis_cost_scale = book.cost_scale;
    for (int k = 0; k < 4; ++k)
        for (int p = 0; p < n_points; ++p) {
            t.trellis_lut[p | k << (t.bits - 1)] = book.i8[4 * p + k];
            t.trellis_levels[k][p] = book.centroids[4 * p + k];
            if (p > 0) t.trellis_bounds[k][p - 1] = (t.trellis_levels[k][p - 1] + t.trellis_levels[k][p]) / 2;
        }
    for (std::uint32_t j = 0; j < 64; ++j) t.trellis_subset[j] = static_cast<std::uint8_t>(book.subset(2 * j));
}

void decode_composite_panel(const TileShape& shape, const std::uint8_t* tile, float* panel) {
    composite_decode(shape, tile, panel);
    if (shape.side == Side::key) return;
    const std::vector<float> columns(panel, panel + static_cast<std::ptrdiff_t>(shape.head_dim) * kTileKeys);
    for (int dim = 0; dim < shape.head_dim; ++dim)
        for (int slot = 0; slot < kTileKeys; ++slot)
            panel[panels::index(Levels::real, Side::value, shape.head_dim, slot, dim)] =
                columns[static_cast<std::size_t>(dim) * kTileKeys + slot];
}

std::unique_ptr<CodecTables> build(CodecId codec, int head_dim) {
    auto t = std::make_unique<CodecTables>();
    const CodecInfo& info = codec_info(codec);
    t->codec = codec;
    t->bits = info.bits;
    t->head_dim = head_dim;
    t->i8 = panel_kind(codec) == PanelKind::i8;
    t->rotated = info.rotated;
    t->decode = is_composite(codec) ? &decode_composite_panel : nullptr;
    const Rotation& r = rotation_for(head_dim);
    t->pow2 = r.pow2();
    t->odd = r.odd();
    t->rotation_norm = 1 / std::sqrt(static_cast<float>(r.pow2()));
    t->signs_in = r.signs_in().data();
    t->signs_out = r.signs_out().data();
    t->hartley = r.hartley().data();
    if (info.family == Family::trellis)
        fill_trellis(*t);
    else if (info.rotated)
        fill_codebook(*t);
    return t;
}

}  // namespace

const CodecTables* find_codec_tables(CodecId codec, int head_dim) {
    constexpr std::size_t n_codecs = std::size(kCodecs), n_dims = std::size(kHeadDims);
    static std::array<std::unique_ptr<CodecTables>, n_codecs * n_dims> owner;
    static std::array<std::atomic<const CodecTables*>, n_codecs * n_dims> ready;
    static std::mutex mutex;
    std::size_t c = 0, d = 0;
    while (c < n_codecs && kCodecs[c].id != codec) ++c;
    while (d < n_dims && kHeadDims[d] != head_dim) ++d;
    if (c == n_codecs || d == n_dims) return nullptr;
    const std::size_t i = c * n_dims + d;
    if (const CodecTables* t = ready[i].load(std::memory_order_acquire)) return t;
    const std::lock_guard lock(mutex);
    if (!owner[i]) owner[i] = build(codec, head_dim);
    ready[i].store(owner[i].get(), std::memory_order_release);
    return owner[i].get();
}

const CodecTables& codec_tables(CodecId codec, int head_dim) {
    if (const CodecTables* t = find_codec_tables(codec, head_dim)) return *t;
    throw std::invalid_argument("kernels: no tables for codec " + std::to_string(static_cast<int>(codec)) + " with heads of " +
                                std::to_string(head_dim) + " values; see kCodecs and kHeadDims in codec/codec.h");
}

}  // namespace turboquant
