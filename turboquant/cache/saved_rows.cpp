#include "turboquant/cache/saved_rows.h"

#include <algorithm>
#include <utility>

namespace turboquant {

void SavedRowWriter::write(std::int64_t i, const RowSnapshot& snapshot) {
    const std::span<std::uint16_t> out = row(i);
    std::ranges::copy(snapshot.values, out.begin());
    if (snapshot.kind == RowKind::measuring) tag_keys(out, snapshot.pos, order_.name(snapshot.sequence));
    if (snapshot.kind == RowKind::exact) tag_exact_keys(out, snapshot.pos, snapshot.mu_hash);
}

std::uint8_t* SavedRowWriter::begin(std::int64_t i, const RowSnapshot& snapshot) {
    if (snapshot.kind == RowKind::plain) return reinterpret_cast<std::uint8_t*>(row(i).data());
    const RowForm& f = *snapshot.form;
    const bool residual = !snapshot.residual.empty();
    if (header_.codecs != f.codecs || header_.head_dim != f.head_dim || header_.scale_hash != f.scale_hash ||
        header_.residual != residual || !header_.places.header) {  // once a call, mostly
        header_.codecs = f.codecs, header_.head_dim = f.head_dim, header_.scale_hash = f.scale_hash, header_.residual = residual;
        header_.places = row_places(n_embd_, header_);
    }
    header_.pos = snapshot.pos, header_.mu_hash = snapshot.mu_hash;
    header_.piece = snapshot.pos >= 0 ? order_.number(first_row_ + i, snapshot.sequence) : -1;
    std::uint8_t* codes = pack_row(row(i), header_, snapshot.mu).data();
    if (residual) std::ranges::copy(snapshot.residual, packed_residual(row(i), header_).begin());
    return codes;
}

void CarriedOffsets::add(std::span<const std::uint16_t> row, const PackedHeader& header) {
    if (header.mu_hash == 0 || header.mu_hash == last_complete_) return;
    if (by_hash_.size() > kMost) clear();
    Carried& carried = by_hash_.try_emplace(header.mu_hash, Carried{MuPieces(row.size()), {}}).first->second;
    if (carried.mu.empty()) {
        carried.pieces.add(row, header);
        if (auto mu = carried.pieces.complete()) carried.mu = std::move(*mu);
    }
    if (!carried.mu.empty()) last_complete_ = header.mu_hash;
}

std::span<const std::uint16_t> CarriedOffsets::find(std::uint32_t hash) const {
    const auto found = by_hash_.find(hash);
    return found == by_hash_.end() ? std::span<const std::uint16_t>() : found->second.mu;
}

RowSnapshot SavedRowReader::read(std::int64_t i) {
    constexpr std::int64_t kAhead = 16, kLine = 64;  // rows lie far apart for a hardware prefetcher
    const auto* ahead = reinterpret_cast<const char*>(in_ + (i + kAhead) * static_cast<std::int64_t>(n_embd_));
    const auto taken = static_cast<std::int64_t>(header_.places.mu());
    for (std::int64_t at = 0; at <= taken; at += kLine) __builtin_prefetch(ahead + at);
    const std::span<const std::uint16_t> row(in_ + i * n_embd_, n_embd_);
    RowSnapshot s;
    if (next_packed_header(row, header_)) {
        offsets_.add(row, header_);
        s.kind = RowKind::codes;
        s.mu_hash = header_.mu_hash;
        s.pos = header_.mu_hash ? header_.pos : -1;
        const std::span bytes(reinterpret_cast<const std::uint8_t*>(row.data()), row.size_bytes());
        s.codes = bytes.subspan(header_.places.header, header_.places.codes);
        s.residual = bytes.subspan(header_.places.header + header_.places.codes, header_.places.residual);
        s.form = form();
        return s;
    }
    s.values = row;
    if (side_ == Side::value) return s;
    const KeyTag tag = read_tag(row);
    if (tag.pos >= 0)
        s = {tag.mu_hash ? RowKind::exact : RowKind::measuring, tag.pos, tag.offset_id, tag.mu_hash, {}, nullptr, {}, {}, row};
    return s;
}

// That of the row before, mostly.
const RowForm* SavedRowReader::form() {
    const auto is_form = [&](const RowForm& f) {
        return f.head_dim == header_.head_dim && f.scale_hash == header_.scale_hash && f.codecs == header_.codecs;
    };
    if (forms_.empty() || !is_form(forms_.front())) forms_.push_front({header_.codecs, header_.head_dim, header_.scale_hash});
    return &forms_.front();
}

}  // namespace turboquant
