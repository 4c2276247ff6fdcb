#include "turboquant/cache/saved_row.h"

#include <algorithm>
#include <cstring>

#include "turboquant/cache/positions.h"
#include "turboquant/codec/fnv.h"
#include "turboquant/codec/residual.h"

namespace turboquant {
namespace {

constexpr std::uint16_t kMark = 0x7e54;
constexpr std::uint8_t kNan = 0x7e;  // high byte of an fp16 NaN
constexpr std::uint8_t kVersion = 1, kScaledVersion = 2, kMixedVersion = 3;
constexpr std::uint8_t kNumbered = 3;  // added to these: the number of the piece stands in the position's highest byte
constexpr std::uint8_t kResidual = 6;  // added to these: with a residual
constexpr std::size_t kHeaderBytes = 16, kScaledHeaderBytes = 20;
constexpr std::size_t kTagBits = 64;
constexpr int kHeadDimUnit = 16;

constexpr std::uint32_t check_word(std::uint32_t pos, int id) {
    return ((pos * 0x9E3779B1u) ^ 0x54517631u) + static_cast<std::uint32_t>(id);
}

constexpr std::uint32_t exact_check_word(std::uint32_t pos, std::uint32_t hash) {
    return (pos * 0x85EBCA6Bu ^ 0x45784163u) + (hash ^ hash >> 15) * 0xC2B2AE35u;
}

/// Check of the header's fields (FNV-1a, folded). A damaged header must not be believed: attention's tables reach to the largest position.
std::uint16_t header_check(const std::uint8_t* p, std::size_t bytes) {
    Fnv1a<std::uint32_t> hash;
    for (std::size_t i = 4; i < bytes; i++)
        if (i != 7) hash.add(p[i]);
    return static_cast<std::uint16_t>(hash.value() ^ hash.value() >> 16);
}

std::uint8_t version(const PackedHeader& h) { return h.codecs.mixed() ? kMixedVersion : h.scale_hash ? kScaledVersion : kVersion; }

/// Of a row of n_head heads; mixed formats are named head by head.
std::size_t header_bytes(std::uint8_t version, std::size_t n_head) {
    return version == kMixedVersion ? kScaledHeaderBytes + n_head : version == kScaledVersion ? kScaledHeaderBytes : kHeaderBytes;
}

bool has_residual(const std::uint8_t* p) { return p[4] > kResidual; }
/// Whether the number of the row's piece stands beside its position.
bool numbered(const std::uint8_t* p) { return p[4] - (has_residual(p) ? kResidual : 0) > kMixedVersion; }
/// Without what these two add.
std::uint8_t plain_version(const std::uint8_t* p) {
    return static_cast<std::uint8_t>(p[4] - (has_residual(p) ? kResidual : 0) - (numbered(p) ? kNumbered : 0));
}

bool header_whole(const std::uint8_t* p, std::size_t bytes) { return p[3] == kNan && (p[2] | p[7] << 8) == header_check(p, bytes); }

/// Position, hash of the offset, number of the piece. False if no row was written so.
bool read_place(const std::uint8_t* p, std::size_t n_pieces, PackedHeader& out) {
    std::int32_t pos;
    std::uint32_t mu_hash;
    std::memcpy(&pos, p + 8, 4);
    std::memcpy(&mu_hash, p + 12, 4);
    int piece = -1;
    if (numbered(p)) {
        piece = p[11];
        pos &= CellPositions::kMaxPosition - 1;
        if (mu_hash == 0 || static_cast<std::size_t>(piece) >= n_pieces) return false;
    } else if (mu_hash && pos >= 0) {
        piece = static_cast<int>(static_cast<std::size_t>(pos) % n_pieces);
    }
    out.pos = pos, out.mu_hash = mu_hash, out.piece = piece;
    return true;
}

const RowPlaces& known_places(std::size_t n_embd, const PackedHeader& h, RowPlaces& made) {
    return h.places.header ? h.places : made = row_places(n_embd, h);
}

/// Formats named in a header that may be damaged.
std::optional<HeadCodecs> codecs_of(std::span<const std::uint8_t> ids) {
    for (const std::uint8_t id : ids)
        if (!find_codec_info(CodecId{id}) || !mixes(CodecId{id})) return std::nullopt;
    if (ids.empty()) return std::nullopt;
    if (ids.size() == 1) return HeadCodecs(CodecId{ids[0]});
    std::vector<CodecId> codecs;
    for (const std::uint8_t id : ids) codecs.push_back(CodecId{id});
    return HeadCodecs(std::move(codecs));
}

}  // namespace

RowPlaces row_places(std::size_t n_embd, const PackedHeader& h) {
    const std::size_t n_head = n_embd / h.head_dim, header = header_bytes(version(h), n_head);
    std::size_t codes = h.codecs.mixed() ? 0 : n_head * h.head_bytes(0);
    for (int i = 0; h.codecs.mixed() && i < static_cast<int>(n_head); i++) codes += h.head_bytes(i);
    const std::size_t residual = h.residual ? n_head * residual_bytes(h.head_dim) : 0, taken = header + codes + residual;
    const std::size_t piece = taken < 2 * n_embd ? 2 * n_embd - taken : 0;
    return {header, codes, residual, piece, piece ? (2 * n_embd + piece - 1) / piece : 0};
}

std::uint32_t hash_mu(std::span<const std::uint16_t> mu) {
    Fnv1a<std::uint32_t> hash;
    for (const std::uint16_t v : mu) hash.add(v & 0xff), hash.add(v >> 8);
    return hash.value() ? hash.value() : 1;
}

std::span<std::uint8_t> pack_row(std::span<std::uint16_t> row, const PackedHeader& header, std::span<const std::uint16_t> mu) {
    auto* p = reinterpret_cast<std::uint8_t*>(row.data());
    RowPlaces made;
    const RowPlaces& d = known_places(row.size(), header, made);
    std::memset(p, 0, d.header);
    row[0] = kMark;
    p[4] = version(header), p[5] = static_cast<std::uint8_t>(header.codecs.of(0)),
    p[6] = static_cast<std::uint8_t>(header.head_dim / kHeadDimUnit);
    std::memcpy(p + 8, &header.pos, 4);
    std::memcpy(p + 12, &header.mu_hash, 4);
    if (version(header) != kVersion) std::memcpy(p + kHeaderBytes, &header.scale_hash, 4);
    for (int h = 0; header.codecs.mixed() && h < header.codecs.count(); h++)
        p[kScaledHeaderBytes + h] = static_cast<std::uint8_t>(header.codecs.of(h));
    const bool carries = !mu.empty() && header.pos >= 0;
    const std::size_t by_position = carries ? static_cast<std::size_t>(header.pos) % d.n_pieces : 0;
    const std::size_t piece = carries && header.piece >= 0 ? static_cast<std::size_t>(header.piece) % d.n_pieces : by_position;
    // Where both agree the row is one that 0.1.0 reads.
    if (piece != by_position) p[4] += kNumbered, p[11] = static_cast<std::uint8_t>(piece);
    if (header.residual) p[4] += kResidual;
    const std::uint16_t check = header_check(p, d.header);
    p[2] = static_cast<std::uint8_t>(check), p[3] = kNan, p[7] = static_cast<std::uint8_t>(check >> 8);
    std::uint8_t* const after = p + d.mu();
    const std::size_t first = piece * d.piece, carried = carries ? std::min(d.piece, 2 * mu.size() - first) : 0;
    if (carried) std::memcpy(after, reinterpret_cast<const std::uint8_t*>(mu.data()) + first, carried);
    std::memset(after + carried, 0, 2 * row.size() - d.mu() - carried);
    return {p + d.header, d.codes};
}

std::optional<PackedHeader> packed_header(std::span<const std::uint16_t> row) {
    if (row.size() < kHeaderBytes / 2 || row[0] != kMark) return std::nullopt;
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    PackedHeader h;
    h.head_dim = p[6] * kHeadDimUnit;
    if (!head_dim_supported(h.head_dim) || row.size() % h.head_dim != 0) return std::nullopt;
    h.residual = has_residual(p);
    const std::uint8_t v = plain_version(p);
    const std::size_t n_head = row.size() / h.head_dim, bytes = header_bytes(v, n_head);
    if (bytes > 2 * row.size() || !header_whole(p, bytes)) return std::nullopt;
    if (v != kVersion) std::memcpy(&h.scale_hash, p + kHeaderBytes, 4);
    const auto codecs = codecs_of(v == kMixedVersion ? std::span(p + kScaledHeaderBytes, n_head) : std::span(p + 5, 1));
    if (!codecs) return std::nullopt;
    h.codecs = *codecs;
    h.places = row_places(row.size(), h);
    if (v != version(h) || h.places.piece == 0 || !read_place(p, h.places.n_pieces, h)) return std::nullopt;
    return h;
}

bool next_packed_header(std::span<const std::uint16_t> row, PackedHeader& header) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    // Where codes end depends on the formats alone, so a row of version 1 or 4 is like `header` if the formats are.
    const bool alike = row.size() >= kHeaderBytes / 2 && row[0] == kMark && header.head_dim > 0 && version(header) == kVersion &&
                       plain_version(p) == kVersion && p[5] == static_cast<std::uint8_t>(header.codecs.of(0)) &&
                       p[6] * kHeadDimUnit == header.head_dim && has_residual(p) == header.residual;
    if (alike) return header_whole(p, kHeaderBytes) && read_place(p, header.places.n_pieces, header);
    auto read = packed_header(row);
    if (read) header = std::move(*read);
    return read.has_value();
}

std::span<const std::uint8_t> packed_codes(std::span<const std::uint16_t> row, const PackedHeader& header) {
    RowPlaces made;
    const RowPlaces& d = known_places(row.size(), header, made);
    return {reinterpret_cast<const std::uint8_t*>(row.data()) + d.header, d.codes};
}

std::span<const std::uint8_t> packed_residual(std::span<const std::uint16_t> row, const PackedHeader& header) {
    RowPlaces made;
    const RowPlaces& d = known_places(row.size(), header, made);
    return {reinterpret_cast<const std::uint8_t*>(row.data()) + d.header + d.codes, d.residual};
}

std::span<std::uint8_t> packed_residual(std::span<std::uint16_t> row, const PackedHeader& header) {
    RowPlaces made;
    const RowPlaces& d = known_places(row.size(), header, made);
    return {reinterpret_cast<std::uint8_t*>(row.data()) + d.header + d.codes, d.residual};
}

void MuPieces::add(std::span<const std::uint16_t> row, const PackedHeader& header) {
    if (header.mu_hash == 0 || header.pos < 0) return;
    RowPlaces made;
    const RowPlaces& d = known_places(row.size(), header, made);
    if (hash_ != header.mu_hash || seen_.empty()) hash_ = header.mu_hash, seen_.assign(2 * mu_.size(), false);
    const std::size_t piece = static_cast<std::size_t>(header.piece) % d.n_pieces, first = piece * d.piece;
    const std::size_t n = std::min(d.piece, 2 * mu_.size() - first);
    std::memcpy(reinterpret_cast<std::uint8_t*>(mu_.data()) + first, reinterpret_cast<const std::uint8_t*>(row.data()) + d.mu(), n);
    std::fill_n(seen_.begin() + static_cast<std::ptrdiff_t>(first), n, true);
}

std::optional<std::vector<std::uint16_t>> MuPieces::complete() const {
    if (seen_.empty() || std::find(seen_.begin(), seen_.end(), false) != seen_.end() || hash_mu(mu_) != hash_) return std::nullopt;
    return mu_;
}

void tag_keys(std::span<std::uint16_t> row, std::int32_t pos, int offset_id) {
    if (row.size() < kTagBits || pos < 0) return;
    const auto p = static_cast<std::uint32_t>(pos);
    const std::uint64_t bits = p | static_cast<std::uint64_t>(check_word(p, offset_id)) << 32;
    for (std::size_t i = 0; i < kTagBits; i++) row[i] = static_cast<std::uint16_t>((row[i] & ~1u) | (bits >> i & 1));
}

void tag_exact_keys(std::span<std::uint16_t> row, std::int32_t pos, std::uint32_t mu_hash) {
    const auto p = static_cast<std::uint32_t>(pos);
    const std::uint32_t words[] = {p, exact_check_word(p, mu_hash), mu_hash};
    for (std::size_t i = 0; i < kTagValues; i++) row[i] = static_cast<std::uint16_t>((row[i] & ~1u) | (words[i / 32] >> i % 32 & 1));
}

void clear_tag(std::span<std::uint16_t> row) {
    for (std::size_t i = 0; i < std::min(kTagValues, row.size()) && row.size() >= kTagBits; i++) row[i] &= static_cast<std::uint16_t>(~1u);
}

KeyTag read_tag(std::span<const std::uint16_t> row) {
    if (row.size() < kTagBits) return {};
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < kTagBits; i++) bits |= static_cast<std::uint64_t>(row[i] & 1) << i;
    const auto pos = static_cast<std::uint32_t>(bits);
    std::uint32_t hash = 0;
    for (std::size_t i = 64; i < kTagValues && row.size() >= kTagValues; i++) hash |= static_cast<std::uint32_t>(row[i] & 1) << (i - 64);
    if (hash && static_cast<std::uint32_t>(bits >> 32) == exact_check_word(pos, hash) && pos <= 0x7fffffffu)
        return {static_cast<std::int32_t>(pos), 0, hash};
    const std::uint32_t id = static_cast<std::uint32_t>(bits >> 32) - check_word(pos, 0);
    return id < static_cast<std::uint32_t>(CellPositions::kMaxOffsets) && pos <= 0x7fffffffu
               ? KeyTag{static_cast<std::int32_t>(pos), static_cast<int>(id), 0}
               : KeyTag{};
}

}  // namespace turboquant
