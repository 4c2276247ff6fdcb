#include "turboquant/cache/saved_row.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>

#include "turboquant/codec/quantizer.h"

using namespace turboquant;

namespace {
std::vector<std::uint16_t> random_halves(std::size_t n, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<std::uint16_t> x(n);
    for (auto& h : x) h = to_half(normal(rng));
    return x;
}
}  // namespace

TEST(SavedRow, PackedLayoutIsPinned) {
    std::vector<std::uint16_t> row(128);
    const std::vector<std::uint16_t> mu(128, 0x3c00);
    const auto codes = pack_row(row, {CodecId::turbo4, 64, 258, hash_mu(mu)}, mu);
    EXPECT_EQ(codes.size(), 68u);
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    const std::uint8_t head[] = {0x54, 0x7e, 0xdd, 0x7e, 1, 1, 4, 0xdb, 2, 1, 0, 0};
    EXPECT_EQ(std::memcmp(p, head, sizeof head), 0);
    EXPECT_TRUE(std::isnan(from_half(row[0]))) << "a foreign f16 cache must fail visibly";
    const auto h = packed_header(row);
    ASSERT_TRUE(h);
    EXPECT_EQ(h->pos, 258);
    EXPECT_EQ(h->head_dim, 64);
    EXPECT_EQ(h->codecs, CodecId::turbo4);
}

TEST(SavedRow, RowsOfScaledKeysAreVersion2) {
    std::vector<std::uint16_t> row(128);
    const std::vector<std::uint16_t> mu(128, 0x3c00);
    const auto codes = pack_row(row, {CodecId::turbo4, 64, 258, hash_mu(mu), 0x01020304}, mu);
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    EXPECT_EQ(codes.data(), p + 20);
    const std::uint8_t hash[] = {4, 3, 2, 1};
    EXPECT_EQ(p[4], 2);
    EXPECT_EQ(std::memcmp(p + 16, hash, sizeof hash), 0);
    ASSERT_TRUE(packed_header(row));
    EXPECT_EQ(packed_header(row)->scale_hash, 0x01020304u);
    const auto packed = row;
    for (std::size_t bit = 0; bit < 20 * 8; bit++) {
        row = packed;
        row[bit / 16] ^= static_cast<std::uint16_t>(1u << bit % 16);
        EXPECT_FALSE(packed_header(row)) << bit;
    }
}

TEST(SavedRow, RowsInWindowsOfResidualsAreVersion7) {
    std::vector<std::uint16_t> row(128), mu(128);
    for (std::size_t i = 0; i < mu.size(); i++) mu[i] = static_cast<std::uint16_t>(0x3c00 + i);
    PackedHeader header{CodecId::turbo3, 64, 260, hash_mu(mu)};
    header.residual = true;
    const auto codes = pack_row(row, header, mu);
    const auto residual = packed_residual(std::span(row), header);
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    EXPECT_EQ(p[4], 7);
    EXPECT_EQ(codes.data(), p + 16);
    EXPECT_EQ(codes.size(), 2 * 26u);
    EXPECT_EQ(residual.data(), p + 16 + 52);
    EXPECT_EQ(residual.size(), 2 * 34u);
    EXPECT_EQ(std::memcmp(p + 16 + 52 + 68, mu.data() + 120, 16), 0) << "the last of three pieces of mu, of 120 bytes each: 260 % 3 is 2";
    ASSERT_TRUE(packed_header(row));
    EXPECT_TRUE(packed_header(row)->residual);
    EXPECT_EQ(packed_header(row)->codecs, CodecId::turbo3);
    const auto packed = row;
    for (std::size_t bit = 0; bit < 16 * 8; bit++) {
        row = packed;
        row[bit / 16] ^= static_cast<std::uint16_t>(1u << bit % 16);
        EXPECT_FALSE(packed_header(row)) << bit;
    }
    // Its pieces of mu are of another size than those of rows without: both together tell it.
    MuPieces pieces(128);
    for (const auto& [piece, with] : {std::pair(0, true), std::pair(1, false), std::pair(1, true)}) {
        EXPECT_FALSE(pieces.complete()) << piece;
        header.residual = with;
        header.piece = piece;
        pack_row(row, header, mu);
        EXPECT_EQ(packed_header(row)->piece, piece);
        EXPECT_EQ(packed_header(row)->pos, 260);
        pieces.add(row, *packed_header(row));
    }
    EXPECT_EQ(pieces.complete(), mu);
}

TEST(SavedRow, RowsOfDifferentHeadsAreVersion3) {
    std::vector<std::uint16_t> row(128);
    const std::vector<std::uint16_t> mu(128, 0x3c00);
    const HeadCodecs codecs({CodecId::tcq3, CodecId::turbo8});
    const auto codes = pack_row(row, {codecs, 64, 258, hash_mu(mu)}, mu);
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    EXPECT_EQ(codes.data(), p + 22);
    EXPECT_EQ(codes.size(), row_bytes(CodecId::tcq3, 64) + row_bytes(CodecId::turbo8, 64));
    const std::uint8_t ids[] = {0, 0, 0, 0, 9, 6};
    EXPECT_EQ(p[4], 3);
    EXPECT_EQ(std::memcmp(p + 16, ids, sizeof ids), 0);
    ASSERT_TRUE(packed_header(row));
    EXPECT_EQ(packed_header(row)->codecs, codecs);
    EXPECT_EQ(packed_header(row)->mu_hash, hash_mu(mu));
    MuPieces pieces(128);
    for (int pos = 0; pos < 64; pos++) {
        std::vector<std::uint16_t> other(128);
        pack_row(other, {codecs, 64, pos, hash_mu(mu)}, mu);
        pieces.add(other, *packed_header(other));
    }
    EXPECT_EQ(pieces.complete(), mu);
    const auto packed = row;
    for (std::size_t bit = 0; bit < 22 * 8; bit++) {
        row = packed;
        row[bit / 16] ^= static_cast<std::uint16_t>(1u << bit % 16);
        EXPECT_FALSE(packed_header(row)) << bit;
    }
}

TEST(SavedRow, EveryFormatLeavesRoomForTheHeader) {
    for (const CodecInfo& c : kCodecs)
        for (const int d : kHeadDims) {
            if (!c.rotated) continue;
            std::vector<std::uint16_t> row(d);
            pack_row(row, {c.id, d, 0, 0}, {});
            EXPECT_TRUE(packed_header(row)) << c.name << d;
            pack_row(row, {c.id, d, 0, 0, 1}, {});
            EXPECT_TRUE(packed_header(row)) << c.name << d;
        }
}

TEST(SavedRow, AHeaderReadAfterAnotherOneIsAsReadAlone) {
    const auto mu = random_halves(128, 3);
    const HeadCodecs mixed(std::vector<CodecId>{CodecId::turbo3, CodecId::turbo4});
    const PackedHeader kinds[] = {
        {CodecId::turbo4, 64, 258, hash_mu(mu)},    {CodecId::turbo4, 64, -1, 0}, {CodecId::turbo4, 128, 9, hash_mu(mu)},
        {CodecId::tcq3, 64, 3, hash_mu(mu)},        {mixed, 64, 5, hash_mu(mu)},  {CodecId::turbo4, 64, 7, hash_mu(mu), 99},
        {CodecId::turbo4, 64, 4, hash_mu(mu), 0, 1}};
    std::mt19937 rng(5);
    PackedHeader header;
    int read = 0;
    for (int trial = 0; trial < 3000; trial++) {
        std::vector<std::uint16_t> row(128);
        pack_row(row, kinds[rng() % std::size(kinds)], mu);
        if (rng() % 4 == 0) row[rng() % 10] ^= static_cast<std::uint16_t>(1u << rng() % 16);
        const auto alone = packed_header(row);
        const PackedHeader before = header;
        ASSERT_EQ(next_packed_header(row, header), alone.has_value());
        const PackedHeader& expected = alone ? *alone : before;
        EXPECT_TRUE(header.codecs == expected.codecs && header.head_dim == expected.head_dim && header.pos == expected.pos &&
                    header.mu_hash == expected.mu_hash && header.scale_hash == expected.scale_hash && header.piece == expected.piece);
        read += alone.has_value();
    }
    EXPECT_GT(read, 2000);
    EXPECT_LT(read, 2900);
}

TEST(SavedRow, NothingOfWhatWasInTheMemoryIsLeft) {
    const auto mu = random_halves(128, 3);
    for (const bool carries : {false, true})
        for (int pos = 0; pos < 6; pos++) {
            const PackedHeader h{CodecId::turbo3, 64, pos, carries ? hash_mu(mu) : 0};
            const auto offset = carries ? std::span<const std::uint16_t>(mu) : std::span<const std::uint16_t>();
            std::vector<std::uint16_t> clean(128), dirty(128, 0xffff);
            for (auto* row : {&clean, &dirty}) std::ranges::fill(pack_row(*row, h, offset), std::uint8_t{7});
            EXPECT_EQ(clean, dirty) << pos;
        }
}

TEST(SavedRow, ForeignRowsAreNotPacked) {
    std::mt19937 rng(2);
    std::vector<std::uint16_t> row(128);
    for (int trial = 0; trial < 2000; trial++) {
        for (auto& h : row) h = static_cast<std::uint16_t>(rng());
        EXPECT_FALSE(packed_header(row));
        EXPECT_EQ(read_tag(row).pos, -1);
    }
    pack_row(row, {CodecId::turbo4, 64, 0, 0}, {});
    const auto packed = row;
    for (std::size_t bit = 0; bit < 16 * 8; bit++) {  // a damaged header
        row = packed;
        row[bit / 16] ^= static_cast<std::uint16_t>(1u << bit % 16);
        EXPECT_FALSE(packed_header(row)) << bit;
    }
    EXPECT_EQ(read_tag(std::vector<std::uint16_t>(64, 0)).pos, -1) << "an unwritten row must not look like position 0";
    EXPECT_EQ(read_tag(std::vector<std::uint16_t>(32, 0)).pos, -1);
}

TEST(SavedRow, OffsetTravelsInPieces) {
    for (const CodecId codec : {CodecId::turbo2, CodecId::turbo4, CodecId::turbo8})
        for (const std::size_t n_embd : {64u, 128u, 1024u}) {
            const auto mu = random_halves(n_embd, 3);
            MuPieces collected(n_embd);
            int rows = 0;
            for (; rows < 10 && !collected.complete(); rows++) {
                std::vector<std::uint16_t> row(n_embd);
                const PackedHeader h{codec, 64, 1000 + rows, hash_mu(mu)};
                pack_row(row, h, mu);
                collected.add(row, *packed_header(row));
            }
            ASSERT_TRUE(collected.complete());
            EXPECT_EQ(*collected.complete(), mu);
            EXPECT_LE(rows, 3);
        }
}

TEST(SavedRow, TagRidesInTheLastBit) {
    for (const std::int32_t pos : {0, 1, 4095, 131071, 0x7fffffff}) {
        auto row = random_halves(128, 1);
        const auto before = row;
        tag_keys(row, pos, 17);
        EXPECT_EQ(read_tag(row).pos, pos);
        EXPECT_EQ(read_tag(row).offset_id, 17);
        for (std::size_t i = 0; i < row.size(); i++) EXPECT_LE(std::abs(row[i] - before[i]), 1) << "more than one unit in the last place";
    }
}
