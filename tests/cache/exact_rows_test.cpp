#include "turboquant/cache/exact_rows.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <set>

#include "turboquant/cache/window_attention.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/kernels/kernels.h"

using namespace turboquant;

namespace {

constexpr int kHeads = 2, kDim = 64, kEmbd = kHeads * kDim, kCells = 512;

/// A row's values tell which token it is.
std::vector<float> values(std::span<const std::int32_t> tokens) {
    std::vector<float> x;
    for (const std::int32_t t : tokens)
        for (int i = 0; i < kEmbd; i++) x.push_back(static_cast<float>(t) + 0.25f * static_cast<float>(i % 4));
    return x;
}

struct Store {
    explicit Store(WindowSizes w, std::int64_t streams = 1) : cells(kCells, streams), rows(w, Side::key, kHeads, kDim, kCells, streams) {}
    /// Tokens first..first+n-1 at those positions go to cells from `cell` on; then attention is done.
    void write(int first, int n, std::int64_t cell, bool trimmed = true) {
        std::vector<std::int32_t> pos(n);
        std::vector<std::int64_t> to(n);
        std::iota(pos.begin(), pos.end(), first);
        std::iota(to.begin(), to.end(), cell);
        cells.place(to, pos);
        rows.add(kernels(), values(pos).data(), to, cells);
        if (trimmed) rows.trim(cells);
    }
    std::set<std::int64_t> kept() const {
        std::set<std::int64_t> s;
        for (const std::int64_t row : rows.slots()) EXPECT_TRUE(row < 0 || s.insert(row).second) << "twice: " << row;
        return s;
    }
    void expect_values(std::int64_t row, std::int32_t token) const {
        const auto x = rows.find(row);
        ASSERT_TRUE(x) << row;
        EXPECT_EQ(*x, values(std::span(&token, 1))) << row;
    }
    CellPositions cells;
    ExactRows rows;
};

std::set<std::int64_t> range(std::int64_t a, std::int64_t b) {
    std::set<std::int64_t> s;
    for (; a < b; a++) s.insert(a);
    return s;
}

}  // namespace

TEST(WindowSizes, DefaultIsAShareOfTheContext) {
    EXPECT_EQ(WindowSizes{}.resolve(2048), (WindowSizes{2, 6}));
    EXPECT_EQ(WindowSizes{}.resolve(8192), (WindowSizes{4, 28}));
    EXPECT_EQ(WindowSizes{}.resolve(255), (WindowSizes{0, 0}));
    EXPECT_EQ((WindowSizes{0, 0}).resolve(8192), (WindowSizes{0, 0}));
    EXPECT_EQ((WindowSizes{WindowSizes::kAuto, 100}).resolve(8192), (WindowSizes{4, 100}));
}

TEST(ExactRows, KeepsSinkAndRecent) {
    for (const int batch : {1, 7, 100, 300}) {
        Store s({4, 10});
        for (int at = 0; at < 300; at += batch) s.write(at, std::min(batch, 300 - at), at);
        std::set<std::int64_t> expected = range(290, 300);
        expected.merge(range(0, 4));
        EXPECT_EQ(s.kept(), expected) << batch;
        s.expect_values(0, 0);
        s.expect_values(295, 295);
        EXPECT_LE(s.rows.bytes(), s.rows.full_bytes() + kEmbd * 2u) << "the store closes up";
    }
}

TEST(ExactRows, TheBatchStaysUntilAttentionIsDone) {
    Store s({0, 10});
    s.write(0, 50, 0);
    s.write(50, 100, 50, false);
    EXPECT_EQ(s.kept(), range(40, 150)) << "the batch's first token wants those before it";
    s.rows.trim(s.cells);
    EXPECT_EQ(s.kept(), range(140, 150));
}

TEST(ExactRows, ACutBackSequenceDropsWhatItTookBack) {
    Store s({0, 10});
    s.write(0, 100, 0);
    s.write(90, 5, 200);  // another continuation, in other cells; cells 90..99 were freed
    EXPECT_EQ(s.kept().count(95), 0u);
    EXPECT_EQ(s.kept(), range(200, 205)) << "positions 85..89 had left the window before";
    s.write(94, 1, 300);  // the last token again: nothing is missing
    EXPECT_EQ(s.kept(), (std::set<std::int64_t>{200, 201, 202, 203, 300}));
}

TEST(ExactRows, OverwrittenCellsAreReplaced) {
    Store s({2, 4});
    s.write(0, 50, 0);
    s.write(0, 50, 30);  // another sequence over half of the first
    for (const std::int64_t row : s.kept())
        s.expect_values(row, row < 30 ? static_cast<std::int32_t>(row) : static_cast<std::int32_t>(row - 30));
    EXPECT_TRUE(s.kept().contains(30) && s.kept().contains(79) && !s.kept().contains(45));
}

TEST(ExactRows, SequencesHaveWindowsOfTheirOwnUpToALimit) {
    Store s({1, 3});
    for (int i = 0; i < 12; i++) s.write(0, 20, 20 * i);
    EXPECT_EQ(s.kept().size(), ExactRows::kMaxSequences * 4u);
    EXPECT_TRUE(s.kept().contains(11 * 20 + 19) && !s.kept().contains(19)) << "the last ones written stay";
}

TEST(ExactRows, StreamsAreCopied) {
    Store s({1, 3}, 2);
    s.write(0, 20, 0);
    s.cells.copy_stream(0, 1);
    s.rows.copy_stream(0, 1);
    EXPECT_EQ(s.kept(), (std::set<std::int64_t>{0, 17, 18, 19, kCells, kCells + 17, kCells + 18, kCells + 19}));
    s.expect_values(kCells + 19, 19);
    s.rows.forget(0, kCells);
    EXPECT_EQ(s.kept(), (std::set<std::int64_t>{kCells, kCells + 17, kCells + 18, kCells + 19}));
}

TEST(ExactRows, RoundingIsThatOfHalves) {
    std::mt19937 rng(3);
    std::normal_distribution<float> normal;
    std::vector<float> x(kEmbd), rounded;
    for (int i = 0; i < kEmbd; i++) x[i] = normal(rng) * std::pow(10.0f, static_cast<float>(i % 11 - 8));
    round_row(Side::value, rounded = x);
    for (int i = 0; i < kEmbd; i++) EXPECT_EQ(rounded[i], from_half(to_half(x[i]))) << x[i];
    round_row(Side::key, rounded = x);
    for (int i = 0; i < kEmbd; i++) EXPECT_EQ(rounded[i], from_half(to_half(x[i]) & (i < 96 ? 0xfffe : 0xffff))) << x[i];
}

// A call over a cache whose compressed cells hold nonsense: all that counts is exact, but for what lies outside of the windows.
TEST(WindowAttention, TakesEachCellOnce) {
    constexpr int n = 100, n_tokens = 5;
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> x(n * kEmbd), q(n_tokens * kEmbd), out(n_tokens * kEmbd), expected(n_tokens * kEmbd);
    for (float& f : x) f = normal(rng);
    for (float& f : q) f = normal(rng);
    const auto tiles_of = [&](Side side, const std::vector<float>& from) {
        const TileShape shape{CodecId::raw, side, kDim};
        std::vector<std::uint8_t> t(2 * kHeads * tile_bytes(shape));
        std::vector<std::int64_t> cells(n);
        std::iota(cells.begin(), cells.end(), 0);
        for (int h = 0; h < kHeads; h++)
            encode(kernels(),
                   {shape, t.data() + h * tile_bytes(shape), kHeads * tile_bytes(shape), from.data() + h * kDim, kEmbd, cells.data(), n});
        return t;
    };
    std::vector<std::uint16_t> mask(n_tokens * n, 0);
    for (int t = 0; t < n_tokens; t++)
        for (int j = n - n_tokens + t + 1; j < n; j++) mask[t * n + j] = 0xfc00;
    AttentionArgs a;
    a.n_head = a.n_head_kv = kHeads, a.n_tokens = n_tokens, a.n_kv = n;
    a.q = q.data(), a.q_token_stride = a.out_token_stride = kEmbd, a.q_head_stride = a.out_head_stride = kDim;
    a.mask = mask.data(), a.mask_token_stride = n, a.v_dim_out = kDim, a.scale = 0.125f;
    const auto attend = [&](const std::vector<float>& from, const std::vector<float>& exact_from, WindowSizes w, float* to) {
        const auto k = tiles_of(Side::key, from), v = tiles_of(Side::value, from);
        a.k = {{CodecId::raw, Side::key, kDim},
               k.data(),
               tile_bytes({CodecId::raw, Side::key, kDim}),
               kHeads * tile_bytes({CodecId::raw, Side::key, kDim})};
        a.v = a.k, a.v.shape.side = Side::value, a.v.tiles = v.data();
        a.out = to;
        CellPositions cells(kCells, 1);
        std::vector<std::int64_t> rows(n);
        std::vector<std::int32_t> pos(n);
        std::iota(rows.begin(), rows.end(), 0), std::iota(pos.begin(), pos.end(), 0);
        cells.place(rows, pos);
        ExactRows ke(w, Side::key, kHeads, kDim, kCells, 1), ve(w, Side::value, kHeads, kDim, kCells, 1);
        ke.add(kernels(), exact_from.data(), rows, cells), ve.add(kernels(), exact_from.data(), rows, cells);
        WindowAttention windows;
        if (!windows.split(a, ke, &ve, cells, 0)) return attention(kernels(), a);
        attention(kernels(), windows.compressed());
        attention(kernels(), windows.exact());
        windows.merge(0, 2), windows.merge(1, 2);
    };
    const auto error = [&] {
        double e = 0, size = 0;
        for (std::size_t i = 0; i < out.size(); i++) e += std::pow(out[i] - expected[i], 2), size += std::pow(expected[i], 2);
        return e / size;
    };
    attend(x, x, {0, 0}, expected.data());
    attend(x, x, {3, 20}, out.data());
    EXPECT_LT(error(), 1e-6) << "the same values on both ways";
    std::vector<float> zero(x.size());
    attend(zero, x, {0, n}, out.data());
    EXPECT_LT(error(), 1e-6) << "all cells are exact";
    attend(zero, x, {n, 0}, out.data());
    EXPECT_LT(error(), 1e-6);
    attend(zero, x, {3, 20}, out.data());
    EXPECT_GT(error(), 0.01) << "outside of the windows the compressed cells count";
    // Nonsense in the windows' cells alone must not be seen: token t is at position 95 + t, and its window of 20 begins at 76 + t.
    std::vector<float> broken = x;
    for (int row : {0, 1, 2, 80, 90, 95}) std::fill_n(broken.begin() + row * kEmbd, kEmbd, 50.0f);
    attend(broken, x, {3, 20}, out.data());
    EXPECT_LT(error(), 1e-6);
    std::fill_n(broken.begin() + 76 * kEmbd, kEmbd, 50.0f);  // exact for token 0 alone
    attend(broken, x, {3, 20}, out.data());
    EXPECT_GT(error(), 0.01);
    out.resize(kEmbd), expected.resize(kEmbd);
    EXPECT_LT(error(), 1e-6);
}
