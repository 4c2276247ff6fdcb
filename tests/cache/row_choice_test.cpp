// A saved sequence is whatever rows llama.cpp chose to keep: images, whose tokens share a position, ranges removed, strides, single rows.
// All of them come back bit for bit, or are lost without harm to anything else.
#include <gtest/gtest.h>

#include <functional>

#include "key_cache.h"

using namespace turboquant;
using namespace turboquant::test;

namespace {

class RowChoice : public OverStores {};
TQ_OVER_STORES(RowChoice);

constexpr int kText = 70, kImage = 64, kAfter = 30;
constexpr int kRows = kText + kImage + kAfter;

/// 70 tokens of text, an image at position 70, 30 tokens that follow it.
struct Sequence {
    Sequence() {
        for (int i = 0; i < kRows; i++) {
            pos.push_back(i < kText ? i : i < kText + kImage ? kText : i - kText - kImage + kText + 1);
            beside.push_back(i > kText && i < kText + kImage);
        }
        x = biased_keys(pos, some_bias(), 31);
    }
    std::vector<std::int32_t> pos;
    std::vector<std::uint8_t> beside;
    std::vector<float> x;
};

void write(Cache& c, const Sequence& s, int first, int n) {
    const auto rows = iota64(n, first);
    c.cells.place(rows, std::span(s.pos).subspan(first, n), std::span(s.beside).subspan(first, n));
    ASSERT_TRUE(c.kv->encode_keys(serial(), {s.x.data() + first * kEmbd, kEmbd, rows, {}, {}}, c.cells));
}

std::vector<std::uint8_t> codes(const Cache& c, std::int64_t row) {
    std::vector<std::uint8_t> all(c.kv->layout().row_bytes());
    c.kv->store().rows_out(serial(), row, 1, all.data(), all.size());
    return all;
}

/// The saved form of these rows, range by range, as llama.cpp asks for it.
std::vector<std::uint16_t> save(Cache& c, const std::vector<int>& rows) {
    c.cells.save_order().begin(nullptr, 0);  // another tensor was saved before
    std::vector<std::uint16_t> out(rows.size() * kEmbd);
    for (std::size_t i = 0; i < rows.size(); i++) c.kv.save_row(rows[i], c.cells, std::span(out).subspan(i * kEmbd, kEmbd));
    return out;
}

/// Into cells 200, 202, ..., each a call of its own.
RestoreResult restore(Cache& c, const std::vector<std::uint16_t>& saved) {
    RestoreResult result = RestoreResult::ok;
    for (std::size_t i = 0; i < saved.size() / kEmbd; i++)
        result = worse(result, c.kv.restore_rows(200 + 2 * static_cast<std::int64_t>(i), 1, saved.data() + i * kEmbd, c.cells, true));
    return worse(result, c.kv->finish_restore(serial(), c.cells));
}

std::vector<int> chosen(const std::function<bool(int)>& keep) {
    std::vector<int> rows;
    for (int i = 0; i < kRows; i++)
        if (keep(i)) rows.push_back(i);
    return rows;
}

const std::vector<std::vector<int>> kChoices = {
    chosen([](int) { return true; }),
    chosen([](int i) { return i >= kText && i < kText + kImage; }),  // the image alone
    chosen([](int i) { return i >= kText + 5 && i < kText + 9; }),   // a piece of it
    chosen([](int i) { return i % 2 == 0; }),                        // strides
    chosen([](int i) { return i % 3 == 1; }),
    chosen([](int i) { return i % 6 == 5; }),
    chosen([](int i) { return i < 4 || i >= kRows - 20; }),       // a range removed
    chosen([](int i) { return i == 7 || i == 73 || i == 120; }),  // hardly any
};

TEST_P(RowChoice, ComesBackBitForBit) {
    const Sequence s;
    for (const CodecInfo& codec : kCodecs) {
        if (!codec.rotated) continue;
        Cache a(codec.id);
        write(a, s, 0, kText + 40), write(a, s, kText + 40, kRows - kText - 40);  // the image in two batches
        EXPECT_EQ(a.cells.offset_id(kRows - 1), a.cells.offset_id(0)) << "one sequence, one offset";
        for (const auto& rows : kChoices) {
            SCOPED_TRACE(std::string(codec.name) + ", " + std::to_string(rows.size()) + " rows");
            const auto saved = save(a, rows);
            Cache b(codec.id);
            ASSERT_EQ(restore(b, saved), RestoreResult::ok);
            std::vector<float> before(kEmbd), after(kEmbd);
            std::vector<int> there;
            for (std::size_t i = 0; i < rows.size(); i++) {
                const int row = 200 + 2 * static_cast<int>(i);
                there.push_back(row);
                EXPECT_EQ(b.cells.at(row), s.pos[rows[i]]);
                ASSERT_EQ(codes(b, row), codes(a, rows[i]));
                a.kv->read_row(rows[i], a.cells, before), b.kv->read_row(row, b.cells, after);
                ASSERT_EQ(before, after);
            }
            EXPECT_EQ(save(b, there), saved) << "saved again";
        }
    }
}

// An image in the batches in which offsets are still measured: every row is encoded against what is in force.
TEST_P(RowChoice, ImagesAreMeasuredOnAsTextIs) {
    const Sequence s;
    Cache c(CodecId::turbo8);
    std::vector<std::int32_t> pos;
    std::vector<std::uint8_t> beside;
    for (int frame = 0; frame < 25; frame++)
        for (int i = 0; i < 5; i++) pos.push_back(frame), beside.push_back(i > 0);  // video: frames of five tokens
    const auto x = biased_keys(pos, some_bias(), 33);
    for (int first = 0; first < 125; first += 5) {
        const auto rows = iota64(5, first);
        c.cells.place(rows, std::span(pos).subspan(first, 5), std::span(beside).subspan(first, 5));
        ASSERT_TRUE(c.kv->encode_keys(serial(), {x.data() + first * kEmbd, kEmbd, rows, {}, {}}, c.cells));
        EXPECT_LT(c.error(x, 0, first + 5), 0.002) << first;
    }
    EXPECT_GT(c.error(x, 0, 125), 1e-5);
}

// Too few rows to tell their offset: this cache remembers it; another one loses them, and goes on.
TEST_P(RowChoice, TooFewRowsAreLostAlone) {
    const Sequence s, other;
    for (const CodecId codec : {CodecId::turbo4, CodecId::turbo8, CodecId::tcq3}) {
        Cache a(codec);
        write(a, s, 0, kRows);
        const auto one = save(a, {70}), all = save(a, kChoices[0]);
        const auto before = codes(a, 70);
        a.kv->reset(), a.cells.clear();
        ASSERT_EQ(restore(a, one), RestoreResult::ok);
        EXPECT_EQ(codes(a, 200), before);

        Cache b(codec);
        const auto neighbours = biased_keys(iota32(100), some_bias(), 34);
        ASSERT_TRUE(b.write(neighbours, iota64(100), iota32(100)));
        const double error = b.error(neighbours, 0, 100);
        ASSERT_EQ(restore(b, one), RestoreResult::offset_missing);
        std::vector<float> x(kEmbd);
        b.kv->read_row(200, b.cells, x);
        for (const float v : x) EXPECT_EQ(v, 0);
        EXPECT_EQ(b.error(neighbours, 0, 100), error);
        EXPECT_EQ(b.kv->finish_restore(serial(), b.cells), RestoreResult::ok) << "said once";
        ASSERT_TRUE(b.write(neighbours, iota64(100, 100), iota32(100)));
        EXPECT_EQ(b.error(neighbours, 100, 100), error);
        // A whole copy of the same state then comes back as into an empty cache.
        ASSERT_EQ(restore(b, all), RestoreResult::ok);
        EXPECT_EQ(codes(b, 200 + 2 * 70), before);
    }
}

// A state whose offset pieces, positions or values are damaged costs its own rows.
TEST_P(RowChoice, DamageIsLostAlone) {
    const Sequence s;
    Cache a(CodecId::turbo4);
    write(a, s, 0, kRows);
    const auto saved = save(a, kChoices[0]);
    const auto neighbours = biased_keys(iota32(100), some_bias(), 34);
    for (int kind = 0; kind < 6; kind++) {
        SCOPED_TRACE(kind);
        auto rows = saved;
        for (std::size_t i = 0; i < rows.size() / kEmbd; i++) {
            std::uint16_t* row = rows.data() + i * kEmbd;
            if (kind == 0) row[1] ^= 0x10;                                   // check
            if (kind == 1) row[4] ^= 1;                                      // position
            if (kind == 2) row[6] ^= 1;                                      // hash of the offset
            if (kind == 3) row[kEmbd - 1] ^= 0x10;                           // offset
            if (kind == 4) std::fill_n(row + 8, 34, std::uint16_t{0xffff});  // codes, with scales that are not finite
            if (kind == 5) std::fill_n(row, kEmbd, std::uint16_t{0});
        }
        Cache b(CodecId::turbo4);
        ASSERT_TRUE(b.write(neighbours, iota64(100), iota32(100)));
        const double error = b.error(neighbours, 0, 100);
        EXPECT_EQ(restore(b, rows) == RestoreResult::ok, kind == 5) << "nothing is lost of rows that were never written";
        EXPECT_EQ(b.error(neighbours, 0, 100), error);
        for (int i = 0; i < kRows; i++) {
            std::vector<float> x(kEmbd);
            b.kv->read_row(200 + 2 * i, b.cells, x);
            for (const float v : x) ASSERT_TRUE(std::isfinite(v));
        }
        ASSERT_EQ(restore(b, saved), RestoreResult::ok) << "a good copy afterwards";
        for (int i = 0; i < kRows; i++) EXPECT_EQ(codes(b, 200 + 2 * i), codes(a, i));
    }
}

}  // namespace
