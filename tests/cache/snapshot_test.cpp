// What a cache hands out goes through any packer: a second one (table_rows.h) beside llama.cpp's rows, with the same state afterwards.
#include <gtest/gtest.h>

#include <set>

#include "tests/cache/key_cache.h"
#include "tests/cache/table_rows.h"
#include "turboquant/codec/half.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

class Snapshots : public OverStores {};
TQ_OVER_STORES(Snapshots);

struct Layer {
    Layer(Side side, const HeadCodecs& codecs, WindowSizes windows, const std::string& scales = "")
        : kv({side, codecs, default_norm_mode(side), kEmbd, 512, 1, kOutlierRatio, windows}, kDim) {
        if (side == Side::value || !codec_info(codecs.of(0)).rotated) return;
        kv->enable_offset();
        kv->offset()->set_rope(rope());
        if (!scales.empty()) kv->offset()->set_scales(scales);
    }
    void write(int first_row, int n, unsigned seed) {
        const std::vector<std::int32_t> pos = iota32(n);
        const std::vector<std::int64_t> rows = iota64(n, first_row);
        const std::vector<float> x = biased_keys(pos, some_bias(), seed);
        cells.place(rows, pos);
        ASSERT_TRUE(kv->write(serial(), {x.data(), kEmbd, rows, {}, {}}, cells, kv->offset() != nullptr));
        kv->end_batch(serial(), cells);
    }
    std::vector<std::uint16_t> saved(int first, int n) {
        std::vector<std::uint16_t> out(n * kEmbd);
        cells.save_order().begin(this, first);
        SavedRowWriter writer(out.data(), kEmbd, first, cells.save_order());
        kv->save_rows(serial(), first, n, cells, writer);
        return out;
    }
    CellPositions cells{512, 1};
    HeldTensor kv;
};

struct Case {
    std::string name;
    HeadCodecs codecs;
    WindowSizes windows{2, 8};
    std::string scales{};
};

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const CodecInfo& c : kCodecs)
        all.push_back({std::string(c.name), c.id, c.id == CodecId::raw ? WindowSizes{0, 0} : WindowSizes{2, 8}});
    for (const CodecInfo& c : kCodecs)
        if (c.rotated && OverStores::current != StoreKind::cuda)
            all.push_back({std::string(c.name) + ", residuals", c.id, {2, 8, WindowForm::residual}});
    all.push_back({"mixed", HeadCodecs({CodecId::tcq3, CodecId::turbo8})});
    all.push_back({"no windows", CodecId::turbo4, {0, 0}});
    std::string letters;
    for (int i = 0; i < kEmbd; i++) letters += static_cast<char>('a' + i / 2 % 5);
    all.push_back({"scaled", CodecId::turbo4, {2, 8}, letters});
    return all;
}

// Two sequences, one with a frozen offset and one that is still measured.
TEST_P(Snapshots, AnotherPackerGivesTheSameState) {
    std::set<RowKind> kinds;
    for (const Case& c : cases())
        for (const Side side : {Side::key, Side::value}) {
            SCOPED_TRACE(c.name + (side == Side::key ? " keys" : " values"));
            if (!serves(c.codecs.of(0), kDim)) continue;
            Layer from(side, c.codecs, c.windows, c.scales), by_table(side, c.codecs, c.windows, c.scales),
                by_rows(side, c.codecs, c.windows, c.scales);
            from.write(3, 100, 1);
            from.write(200, 20, 2);
            const int n = 230;
            Table table(n, kEmbd, from.kv->layout().row_bytes());
            TableWriter writer(table);
            from.kv->save_rows(serial(), 0, n, from.cells, writer);
            for (const Table::Record& r : table.rows) kinds.insert(r.kind);
            const std::vector<std::uint16_t> rows = from.saved(0, n);

            const int to = 70;  // across tiles
            const auto places = [](Layer& l) { return l.kv->offset() != nullptr; };
            if (!places(from))
                for (Layer* l : {&by_table, &by_rows})  // positions come with the keys of another layer
                    for (int i = 0; i < n; i++)
                        if (from.cells.at(i) >= 0) l->cells.restore(to + i, from.cells.at(i), {from.cells.offset_id(i), 0}, -1);
            for (int first = 0; first < n; first += 23) {  // in ranges, as llama.cpp does it
                const int part = std::min(23, n - first);
                TableReader reader(table, first);
                ASSERT_EQ(by_table.kv->restore_rows(serial(), to + first, part, reader, by_table.cells, places(by_table)),
                          RestoreResult::ok);
                ASSERT_EQ(by_rows.kv.restore_rows(to + first, part, rows.data() + first * kEmbd, by_rows.cells, places(by_rows)),
                          RestoreResult::ok);
            }
            for (Layer* l : {&by_table, &by_rows}) ASSERT_EQ(l->kv->finish_restore(serial(), l->cells), RestoreResult::ok);
            EXPECT_EQ(by_table.saved(to, n), by_rows.saved(to, n));
            if (!is_composite(c.codecs.of(0))) {  // composites are encoded again
                EXPECT_EQ(by_table.saved(to, n), rows);
            }
        }
    EXPECT_EQ(kinds.size(), 4u) << "a kind of row was not tried";
}

// A state from outside whose table lacks the offset: its rows are lost, and nothing else.
TEST_P(Snapshots, AnOffsetThatIsNotToldCostsItsRows) {
    Layer from(Side::key, CodecId::turbo4, {0, 0}), to(Side::key, CodecId::turbo4, {0, 0});
    from.write(0, 100, 1);
    Table table(100, kEmbd, from.kv->layout().row_bytes());
    TableWriter writer(table);
    from.kv->save_rows(serial(), 0, 100, from.cells, writer);
    ASSERT_EQ(table.mus.size(), 1u);
    table.mus.clear();
    to.write(300, 80, 3);
    const auto before = to.saved(300, 80);
    TableReader reader(table);
    EXPECT_EQ(to.kv->restore_rows(serial(), 0, 100, reader, to.cells, true), RestoreResult::ok) << "more may come";
    EXPECT_EQ(to.kv->finish_restore(serial(), to.cells), RestoreResult::offset_missing);
    std::vector<float> x(kEmbd);
    to.kv->read_row(50, to.cells, x);
    EXPECT_EQ(x, std::vector<float>(kEmbd));
    EXPECT_EQ(to.saved(300, 80), before);
}

}  // namespace
