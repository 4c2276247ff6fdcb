#include "turboquant/codec/composite.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/codec/half.h"
#include "turboquant/codec/prod.h"
#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

constexpr int kSlots = kTileKeys;
static_assert(kSlots == Rotation::kLanes);

bool uniform_levels(const CodecInfo& c, bool outliers) { return c.family == Family::uniform || (c.family == Family::outliers && outliers); }

/// Stored order of the channels: the others, then the outliers. Empty if the mask does not fit.
std::vector<int> channel_order(const TileShape& s, const std::uint8_t* mask) {
    const int n_out = outlier_count(s);
    std::vector<int> order, last;
    for (int i = 0; i < s.head_dim; ++i) (n_out && mask[i / 8] >> i % 8 & 1 ? last : order).push_back(i);
    if (static_cast<int>(last.size()) != n_out) return {};
    order.insert(order.end(), last.begin(), last.end());
    return order;
}

/// A quantized part of one vector: codes and scales in stored order.
struct PartCodes {
    std::vector<std::uint8_t> codes;
    std::vector<std::uint16_t> scales;
};

/// A largest magnitude as fp16 with 8 significant bits, or 4 of them, rounded up, that fit a byte. Not up by the last bits of fp16: a
/// vector that was decoded, rounded and encoded again finds the same scale.
std::uint16_t coarse_half(float a, int scale_bytes) {
    const int half = to_half(a);
    return static_cast<std::uint16_t>(scale_bytes == 2 ? std::min(half + 4, 0x7bff) & ~7 : std::min(half + 120, 0x7bff) & ~127);
}

float level_step(int bits) { return 2.0f / static_cast<float>((1 << bits) - 1); }

PartCodes quantize_uniform(std::span<const float> x, int bits, int group, int scale_bytes) {
    PartCodes out;
    for (std::size_t first = 0; first < x.size(); first += group) {
        const auto part = x.subspan(first, std::min<std::size_t>(group, x.size() - first));
        float a = 0;
        for (const float v : part) a = std::max(a, std::abs(v));
        out.scales.push_back(coarse_half(a, scale_bytes));
        a = from_half(out.scales.back());
        const float top = static_cast<float>((1 << bits) - 1);
        for (const float v : part)
            out.codes.push_back(
                static_cast<std::uint8_t>(std::clamp(std::nearbyint(a > 0 ? (v / a + 1) / level_step(bits) : 0), 0.0f, top)));
    }
    return out;
}

PartCodes quantize_rotated(std::span<const float> x, int bits, NormMode mode) {
    const int n = static_cast<int>(x.size());
    QuantizedVector q = quantize_mse(part_rotation_for(n), codebook_for(bits, n), mode, x);
    return {std::move(q.codes), {to_half(q.scale)}};
}

/// Reads and writes a tile by its layout.
struct Tile {
    CompositeLayout layout;
    std::uint8_t* bytes;

    void put(bool outliers, int slot, const PartCodes& codes) const {
        const CompositePart& part = outliers ? layout.outliers : layout.rest;
        for (int k = 0; k < part.n_scales; ++k) {
            std::uint8_t* scale =
                bytes + layout.mask_bytes + (outliers ? layout.rest.all_scale_bytes() : 0) + part.scale_bytes * (k * kSlots + slot);
            scale[0] = static_cast<std::uint8_t>(part.scale_bytes == 1 ? codes.scales[k] >> 7 : codes.scales[k]);
            if (part.scale_bytes == 2) scale[1] = static_cast<std::uint8_t>(codes.scales[k] >> 8);
        }
        std::uint8_t* p = bytes + layout.plane_offset() + (outliers ? layout.rest.n * layout.rest.bits : 0) * (kSlots / 8) + slot / 8;
        for (const std::uint8_t code : codes.codes)
            for (int b = 0; b < part.bits; ++b, p += kSlots / 8)
                *p = static_cast<std::uint8_t>((*p & ~(1 << slot % 8)) | (code >> b & 1) << slot % 8);
    }
};

/// The slots to decode: one, or all. Decoded values stand in rows of n: rows[i*n + slot - first].
struct Slots {
    int first, n;
};

/// Undoes the rotation of n vectors in columns.
void unrotate(const Rotation& r, Slots slots, float* rows) {
    const std::span<float> x(rows, static_cast<std::size_t>(r.head_dim()) * slots.n);
    slots.n == 1 ? r.inverse(x) : r.inverse_columns(x);
}

class PartReader {
  public:
    PartReader(const CompositeLayout& layout, const std::uint8_t* tile, bool outliers, Slots slots)
        : part_(outliers ? layout.outliers : layout.rest),
          scales_(tile + layout.mask_bytes + (outliers ? layout.rest.all_scale_bytes() : 0)),
          planes_(tile + layout.plane_offset() + (outliers ? kSlots / 8 * layout.rest.n * layout.rest.bits : 0)),
          slots_(slots) {}

    /// Scale k, times `factor`, of all slots.
    void scales(int k, float factor, float* out) const {
        const std::uint8_t* p = scales_ + part_.scale_bytes * (k * kSlots + slots_.first);
        for (int s = 0; s < slots_.n; ++s)
            out[s] = factor * from_half(static_cast<std::uint16_t>(part_.scale_bytes == 1 ? p[s] << 7 : p[2 * s] | p[2 * s + 1] << 8));
    }
    void codes(int i, std::uint8_t* out) const {
        std::fill_n(out, slots_.n, std::uint8_t{0});
        for (int b = 0; b < part_.bits; ++b) {
            const std::uint8_t* word = planes_ + static_cast<std::size_t>(i * part_.bits + b) * (kSlots / 8);
            for (int s = 0; s < slots_.n; ++s)
                out[s] = static_cast<std::uint8_t>(out[s] | (word[(slots_.first + s) / 8] >> (slots_.first + s) % 8 & 1) << b);
        }
    }
    /// rows = levels[code] * scale of group i/group.
    void decode(const float* levels, int group, float* rows) const {
        float scale[kSlots];
        std::uint8_t code[kSlots];
        for (int i = 0; i < part_.n; ++i) {
            if (i % group == 0) scales(i / group, 1, scale);
            codes(i, code);
            for (int s = 0; s < slots_.n; ++s) rows[i * slots_.n + s] = levels[code[s]] * scale[s];
        }
    }

  private:
    CompositePart part_;
    const std::uint8_t *scales_, *planes_;
    Slots slots_;
};

void decode_part(const CodecInfo& info, const CompositeLayout& layout, const std::uint8_t* tile, bool outliers, Slots slots, float* rows) {
    const CompositePart& part = outliers ? layout.outliers : layout.rest;
    const PartReader reader(layout, tile, outliers, slots);
    if (part.n == 0) return;
    if (uniform_levels(info, outliers)) {
        float levels[256];
        for (int c = 0; c < 1 << part.bits; ++c) levels[c] = static_cast<float>(c) * level_step(part.bits) - 1;
        reader.decode(levels, outliers ? part.n : kUniformGroup, rows);
        return;
    }
    reader.decode(codebook_for(part.bits, part.n).centroids.data(), part.n, rows);
    if (info.family != Family::prod) unrotate(part_rotation_for(part.n), slots, rows);
}

/// The sketch's share, S^T sign(S r) * sqrt(pi/2)/d * |r|, added in the rotated space; then the rotation is undone.
void finish_prod(const ProdQuantizer& prod, const CompositeLayout& layout, const std::uint8_t* tile, Slots slots, float* rows) {
    const int d = prod.head_dim(), n = slots.n;
    const PartReader sketch(layout, tile, true, slots);
    float norm[kSlots], sign[kSlots];
    std::uint8_t code[kSlots];
    sketch.scales(0, prod.sketch_gain(), norm);
    for (int j = 0; j < d; ++j) {
        sketch.codes(j, code);
        for (int s = 0; s < n; ++s) sign[s] = code[s] ? norm[s] : -norm[s];
        for (int i = 0; i < d; ++i)
            for (int s = 0; s < n; ++s) rows[i * n + s] += prod.sketch()[j * d + i] * sign[s];
    }
    unrotate(prod.rotation(), slots, rows);
}

/// Channels in stored order, model's space.
std::vector<float> decode_rows(const TileShape& shape, const std::uint8_t* tile, Slots slots) {
    const CodecInfo& info = codec_info(shape.codec);
    const CompositeLayout layout = composite_layout(shape);
    std::vector<float> rows(static_cast<std::size_t>(shape.head_dim) * slots.n);
    decode_part(info, layout, tile, false, slots, rows.data());
    if (info.family == Family::prod)
        finish_prod(prod_quantizer_for(info.bits, shape.head_dim), layout, tile, slots, rows.data());
    else
        decode_part(info, layout, tile, true, slots, rows.data() + static_cast<std::size_t>(layout.rest.n) * slots.n);
    return rows;
}

void check(const TileShape& shape, int slot, std::size_t values) {
    if (!is_composite(shape.codec))
        throw std::invalid_argument("composite: codec '" + std::string(codec_info(shape.codec).name) + "' is none");
    if (!head_dim_supported(shape.head_dim) || values != static_cast<std::size_t>(shape.head_dim))
        throw std::invalid_argument("composite: " + std::to_string(values) + " values for head_dim " + std::to_string(shape.head_dim));
    if (shape.n_outliers < 0 || shape.n_outliers > shape.head_dim / 2)
        throw std::invalid_argument("composite: more than half of the channels are outliers");
    if (slot < 0 || slot >= kSlots) throw std::invalid_argument("composite: slot " + std::to_string(slot) + " is not in 0..63");
}

}  // namespace

void composite_set_mask(const TileShape& shape, std::uint8_t* tile, std::span<const std::uint8_t> outlier) {
    check(shape, 0, outlier.size());
    if (outlier_count(shape) != std::count_if(outlier.begin(), outlier.end(), [](auto o) { return o != 0; }))
        throw std::invalid_argument("composite: the mask must mark " + std::to_string(outlier_count(shape)) + " channels");
    if (!outlier_count(shape)) return;
    std::fill_n(tile, composite_layout(shape).mask_bytes, std::uint8_t{0});
    for (int i = 0; i < shape.head_dim; ++i)
        if (outlier[i]) tile[i / 8] = static_cast<std::uint8_t>(tile[i / 8] | 1 << i % 8);
}

void composite_encode(const TileShape& shape, std::uint8_t* tile, int slot, std::span<const float> x, NormMode mode) {
    check(shape, slot, x.size());
    if (!std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); }))
        throw std::domain_error("composite: the vector holds a NaN or an infinity; check the model's activations");
    const CodecInfo& info = codec_info(shape.codec);
    const Tile out{composite_layout(shape), tile};
    const CompositePart &rest = out.layout.rest, &outliers = out.layout.outliers;
    if (info.family == Family::prod) {
        const ProdVector v = prod_quantizer_for(info.bits, shape.head_dim).quantize(x);
        out.put(false, slot, {v.mse.codes, {to_half(v.mse.scale)}});
        out.put(true, slot, {v.signs, {to_half(v.residual_norm)}});
        return;
    }
    std::vector<int> order = channel_order(shape, tile);
    if (order.empty()) {
        std::vector<std::uint8_t> first(shape.head_dim);
        std::fill_n(first.begin(), outliers.n, std::uint8_t{1});
        composite_set_mask(shape, tile, first);
        order = channel_order(shape, tile);
    }
    std::vector<float> stored;
    for (const int i : order) stored.push_back(x[i]);
    const auto quantize = [&](std::span<const float> values, const CompositePart& part, bool outlier) {
        if (!uniform_levels(info, outlier)) return quantize_rotated(values, part.bits, mode);
        return quantize_uniform(values, part.bits, outlier ? part.n : kUniformGroup, part.scale_bytes);
    };
    out.put(false, slot, quantize(std::span(stored).first(rest.n), rest, false));
    if (outliers.n) out.put(true, slot, quantize(std::span(stored).subspan(rest.n), outliers, true));
}

void composite_decode(const TileShape& shape, const std::uint8_t* tile, float* x) {
    const std::vector<int> order = channel_order(shape, tile);
    if (order.empty()) {
        std::fill_n(x, static_cast<std::size_t>(shape.head_dim) * kSlots, 0.0f);
        return;
    }
    const std::vector<float> rows = decode_rows(shape, tile, {0, kSlots});
    for (int i = 0; i < shape.head_dim; ++i)
        std::copy_n(rows.data() + i * kSlots, kSlots, x + static_cast<std::ptrdiff_t>(order[i]) * kSlots);
}

void composite_decode_slot(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<float> x) {
    check(shape, slot, x.size());
    std::fill(x.begin(), x.end(), 0.0f);
    const std::vector<int> order = channel_order(shape, tile);
    if (order.empty()) return;
    const std::vector<float> stored = decode_rows(shape, tile, {slot, 1});
    for (int i = 0; i < shape.head_dim; ++i) x[order[i]] = stored[i];
}

}  // namespace turboquant
