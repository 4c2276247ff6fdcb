// State saved by version 0.1.0 (tests/data/state-0.1.0, one file a format) comes back bit for bit, whatever became of the code since.
// What is read out of the files here follows docs/formats.md, not the library.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "key_cache.h"
#include "turboquant/codec/tile.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

constexpr int kCells = 128, kFirstCell = 61;  // restored into other cells than they came from, across the border of a tile

struct File {
    std::string name;
    HeadCodecs codecs;
    bool windows = true, offset = true;
    std::string scales{};
    std::vector<std::int32_t> positions{0, 1, 20, 21, 22, 23, 70, 71};
    std::vector<std::uint16_t> keys{}, values{};  ///< rows
};

std::vector<File> files() {
    std::vector<File> all;
    for (const CodecInfo& c : kCodecs) {
        all.push_back({std::string(c.name), c.id, c.id != CodecId::raw});
        if (is_composite(c.id)) all.back().positions = {0, 20, 71};
    }
    all.push_back({"mixed", HeadCodecs({CodecId::tcq3, CodecId::turbo8})});
    std::string letters;
    for (int i = 0; i < kEmbd; i++) letters += static_cast<char>('a' + i / 2 % 5);
    all.push_back({"scaled", CodecId::turbo4, true, true, letters});
    all.push_back({"no-offset", CodecId::turbo4, true, false});
    all.push_back({"no-windows", CodecId::tcq3, false});
    all.push_back({"measuring", CodecId::turbo4});
    all.back().positions = {0, 1, 2, 3, 4};
    for (File& f : all) {
        std::ifstream in(std::string(TQ_TEST_DATA) + "/state-0.1.0/" + f.name + ".rows", std::ios::binary);
        const std::vector<char> bytes(std::istreambuf_iterator<char>(in), {});
        const std::size_t rows = f.positions.size() * kEmbd;
        EXPECT_EQ(bytes.size(), 8 + 4 * rows) << f.name;
        f.keys.resize(rows), f.values.resize(rows);
        if (bytes.size() != 8 + 4 * rows) continue;
        std::memcpy(f.keys.data(), bytes.data() + 8, 2 * rows);
        std::memcpy(f.values.data(), bytes.data() + 8 + 2 * rows, 2 * rows);
    }
    return all;
}

/// The codes in a packed row, or none: docs/formats.md, section 2.
std::optional<std::vector<std::uint8_t>> codes_in(std::span<const std::uint16_t> row, const HeadCodecs& codecs) {
    const auto* p = reinterpret_cast<const std::uint8_t*>(row.data());
    if (row[0] != 0x7e54 || p[3] != 0x7e) return std::nullopt;
    const std::size_t header = p[4] == 1 ? 16 : p[4] == 2 ? 20 : 20 + kHeads;
    std::size_t n = 0;
    for (int h = 0; h < kHeads; h++) n += row_bytes(codecs.of(h), kDim);
    return std::vector<std::uint8_t>(p + header, p + header + n);
}

class SavedState : public OverStores {};
TQ_OVER_STORES(SavedState);

struct Restored {
    Restored(const File& f, Side side)
        : kv({side, f.codecs, default_norm_mode(side), kEmbd, kCells, 1, kOutlierRatio, f.windows ? WindowSizes{2, 2} : WindowSizes{0, 0}},
             kDim) {
        if (side == Side::key && f.offset && codec_info(f.codecs.of(0)).rotated) {
            kv->enable_offset();
            kv->offset()->set_rope(rope());
            if (!f.scales.empty()) kv->offset()->set_scales(f.scales);
        } else {
            // Positions come with the keys of another layer.
            for (std::size_t i = 0; i < f.positions.size(); i++)
                cells.restore(kFirstCell + static_cast<std::int64_t>(i), f.positions[i], {0, 0}, -1);
        }
    }
    bool restore(const std::vector<std::uint16_t>& rows) {
        const bool ok = kv.restore_rows(kFirstCell, static_cast<std::int64_t>(rows.size() / kEmbd), rows.data(), cells,
                                        kv->offset() != nullptr) == RestoreResult::ok;
        kv->finish_restore(serial(), cells);
        return ok;
    }
    std::vector<std::uint8_t> codes(std::int64_t row) const {
        std::vector<std::uint8_t> all(kv->layout().row_bytes());
        kv->store().rows_out(serial(), row, 1, all.data(), all.size());
        return all;
    }
    CellPositions cells{kCells, 1};
    HeldTensor kv;
};

TEST_P(SavedState, Of010ComesBackBitForBit) {
    int packed = 0, exact = 0;
    for (const File& f : files())
        for (const Side side : {Side::key, Side::value}) {
            SCOPED_TRACE(f.name + (side == Side::key ? " keys" : " values"));
            if (!serves(f.codecs.of(0), kDim)) continue;
            const std::vector<std::uint16_t>& saved = side == Side::key ? f.keys : f.values;
            Restored r(f, side);
            ASSERT_TRUE(r.restore(saved));
            for (std::size_t i = 0; i < f.positions.size(); i++) {
                const auto row = std::span(saved).subspan(i * kEmbd, kEmbd);
                const std::int64_t at = kFirstCell + static_cast<std::int64_t>(i);
                EXPECT_EQ(r.cells.at(at), f.positions[i]);
                if (const auto codes = codes_in(row, f.codecs)) {
                    EXPECT_EQ(r.codes(at), *codes) << f.positions[i];
                    if (r.kv->offset()) {
                        std::uint32_t hash;
                        std::memcpy(&hash, row.data() + 6, 4);
                        EXPECT_EQ(r.kv->offset()->mu_hash(r.cells.offset_id(at)), hash);
                        EXPECT_FALSE(r.kv->offset()->expected(r.cells.offset_id(at)));
                    }
                    packed++;
                    continue;
                }
                // fp16 values: of exact windows, of measured keys, of formats without codes.
                std::vector<float> x(kEmbd), expected(kEmbd);
                std::vector<std::uint16_t> halves(row.begin(), row.end());
                const auto found = r.kv->exact() ? r.kv->exact_row(at, r.cells) : std::nullopt;
                if (!found && f.codecs != CodecId::raw) continue;
                if (found)
                    x = *found;
                else
                    r.kv->read_row(at, r.cells, x);
                if (found && side == Side::key) clear_tag(halves);
                std::transform(halves.begin(), halves.end(), expected.begin(), from_half);
                EXPECT_EQ(x, expected) << f.positions[i];
                exact++;
            }
        }
    EXPECT_GE(packed, 4 * 2 * 12);
    EXPECT_GE(exact, 4 * 2 * 12);
}

// What today's code saves of a restored state restores to the same again.
TEST_P(SavedState, Of010SurvivesBeingSavedAgain) {
    for (const File& f : files())
        for (const Side side : {Side::key, Side::value}) {
            SCOPED_TRACE(f.name + (side == Side::key ? " keys" : " values"));
            if (!serves(f.codecs.of(0), kDim)) continue;
            Restored first(f, side), second(f, side);
            ASSERT_TRUE(first.restore(side == Side::key ? f.keys : f.values));
            std::vector<std::uint16_t> again(f.positions.size() * kEmbd);
            for (std::size_t i = 0; i < f.positions.size(); i++)
                first.kv.save_row(kFirstCell + static_cast<std::int64_t>(i), first.cells, std::span(again).subspan(i * kEmbd, kEmbd));
            ASSERT_TRUE(second.restore(again));
            std::vector<float> a(kEmbd), b(kEmbd);
            for (std::size_t i = 0; i < f.positions.size(); i++) {
                const std::int64_t row = kFirstCell + static_cast<std::int64_t>(i);
                first.kv->read_row(row, first.cells, a);
                second.kv->read_row(row, second.cells, b);
                EXPECT_TRUE(a == b || is_composite(f.codecs.of(0))) << f.positions[i];
                EXPECT_EQ(first.cells.at(row), second.cells.at(row));
                EXPECT_TRUE(!first.kv->exact() || first.kv->exact_row(row, first.cells) == second.kv->exact_row(row, second.cells));
            }
        }
}

}  // namespace
