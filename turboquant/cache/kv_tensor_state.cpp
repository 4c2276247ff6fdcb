// Saving and restoring rows (saved_row.h).
#include <algorithm>
#include <cmath>

#include "turboquant/cache/kv_tensor.h"
#include "turboquant/cache/saved_row.h"

namespace turboquant {
namespace {

/// Adds what a packed row holds, decoded, to x (n_embd values in the model's space, without the removed offset).
void decode_packed(std::span<const std::uint16_t> row, const PackedHeader& h, std::span<float> x) {
    const TileShape shape{h.codec, Side::key, h.head_dim};
    const std::span<const std::uint8_t> codes = packed_codes(row, h);
    const std::size_t bytes = row_bytes(h.codec, h.head_dim);
    std::vector<std::uint8_t> tile(tile_bytes(shape));
    for (std::size_t head = 0; head * h.head_dim < x.size(); head++) {
        const auto out = x.subspan(head * h.head_dim, h.head_dim);
        tile_set_row(shape, tile.data(), 0, codes.data() + head * bytes);
        tile_decode_rotated(shape, tile.data(), 0, out);
        rotation_for(h.head_dim).inverse(out);
    }
}

/// False for a damaged row: the scale at the end of a head's codes is infinite or NaN.
bool scales_finite(std::span<const std::uint16_t> row, const PackedHeader& h) {
    const std::span<const std::uint8_t> codes = packed_codes(row, h);
    const std::size_t bytes = row_bytes(h.codec, h.head_dim);
    for (std::size_t end = bytes; end <= codes.size(); end += bytes)
        if ((codes[end - 1] & 0x7c) == 0x7c) return false;
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

void KvTensor::read_row(std::int64_t row, std::int32_t pos, std::span<float> x) const {
    for (int h = 0; h < n_head(); h++) decode_head(row, h, x.subspan(h * head_dim_, head_dim_));
    if (offset_) offset_->remove(x, pos, -1);
}

void KvTensor::save_row(std::int64_t row, std::int32_t pos, std::span<std::uint16_t> out) const {
    if (const FirstRows::Row* kept = first_.find(row); kept && (kept->pos == pos || g_.side == Side::value)) {
        std::copy(kept->values.begin(), kept->values.end(), out.begin());
        return;
    }
    if (!codec_info(g_.codec).rotated) {
        std::vector<float> x(g_.n_embd);
        read_row(row, pos, x);
        std::transform(x.begin(), x.end(), out.begin(), to_half);
        if (offset_) tag_keys(out, pos);
        return;
    }
    const bool frozen = offset_ && offset_->frozen();
    const std::vector<std::uint16_t> mu = frozen && pos >= 0 ? offset_->mu_halves() : std::vector<std::uint16_t>();
    const auto codes = pack_row(out, {g_.codec, head_dim_, pos, mu.empty() ? 0 : hash_mu(mu)}, mu);
    const std::size_t bytes = row_bytes(g_.codec, head_dim_);
    for (int h = 0; h < n_head(); h++) tile_get_row(shape(), tile(row, h), slot(row), codes.data() + h * bytes);
}

RestoreResult KvTensor::restore_rows(const Kernels& k, std::int64_t first, std::int64_t n, const std::uint16_t* in, std::int32_t* pos) {
    const std::size_t n_embd = g_.n_embd;
    const auto saved = [&](std::int64_t i) { return std::span<const std::uint16_t>(in + i * n_embd, n_embd); };
    std::vector<std::optional<PackedHeader>> headers(n);
    MuPieces pieces(n_embd);
    for (std::int64_t i = 0; i < n; i++) {
        headers[i] = packed_header(saved(i));
        if (headers[i]) pieces.add(saved(i), *headers[i]);
        pos[i] = headers[i] ? headers[i]->pos : read_tag(saved(i));
    }
    const auto saved_mu = pieces.complete();
    if (offset_ && !offset_->frozen() && saved_mu) {  // an empty cache takes over the offset of the state it restores
        offset_->freeze(*saved_mu);
        encode_first_rows(k);
    }
    const std::uint32_t mu_hash = offset_ && offset_->frozen() ? hash_mu(offset_->mu_halves()) : 0;

    // Rows of this very format go back bit for bit, the others are decoded and encoded.
    RestoreResult result = RestoreResult::ok;
    std::vector<std::int64_t> rows;
    std::vector<std::int32_t> at;
    std::vector<float> x, one(n_embd);
    for (std::int64_t i = 0; i < n; i++) {
        const std::optional<PackedHeader>& h = headers[i];
        if (h && !scales_finite(saved(i), *h)) {
            std::fill(one.begin(), one.end(), 0.0f);
            result = RestoreResult::not_finite;
            rows.push_back(first + i), at.push_back(pos[i] = -1);
            x.insert(x.end(), one.begin(), one.end());
            continue;
        }
        if (h && h->codec == g_.codec && h->head_dim == head_dim_ && (h->mu_hash == mu_hash || (h->mu_hash == 0 && h->pos < 0))) {
            const std::span<const std::uint8_t> codes = packed_codes(saved(i), *h);
            for (int head = 0; head < n_head(); head++)
                tile_set_row(shape(), tile(first + i, head), slot(first + i), codes.data() + head * row_bytes(g_.codec, head_dim_));
            continue;
        }
        if (h && h->mu_hash != 0 && !saved_mu) {  // what was removed from these keys is not known
            std::fill(one.begin(), one.end(), 0.0f);
            result = RestoreResult::offset_missing;
        } else if (h) {
            decode_packed(saved(i), *h, one);
            if (h->mu_hash != 0) {
                KeyOffset other(static_cast<int>(n_embd) / h->head_dim, h->head_dim);
                if (offset_ && offset_->has_rope()) other.set_rope(offset_->rope());
                if (!offset_) result = RestoreResult::offset_missing;  // without RoPE's parameters R(p) mu cannot be given back
                other.freeze(*saved_mu);
                other.remove(one, h->pos, -1);
            }
        } else if (!decode_plain(saved(i), one)) {
            result = RestoreResult::not_finite;
        }
        rows.push_back(first + i), at.push_back(pos[i]);
        x.insert(x.end(), one.begin(), one.end());
    }
    if (rows.empty()) return result;
    const bool finite = measuring() ? encode_rows(k, x.data(), n_embd, rows, at) : encode_centered(k, rows, at, x);
    return finite ? result : RestoreResult::not_finite;
}

}  // namespace turboquant
