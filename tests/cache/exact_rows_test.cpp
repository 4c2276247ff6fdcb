#include "turboquant/cache/exact_rows.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "turboquant/cache/step_plan.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/kernels/kernels.h"

using namespace turboquant;

namespace {

constexpr int kHeads = 2, kDim = 64, kEmbd = kHeads * kDim, kCells = 512;

/// Rows, and the token that each slot holds.
struct Store {
    explicit Store(WindowSizes w, std::int64_t streams = 1) : cells(kCells, streams), rows(w, 2 * kEmbd, kCells, streams) {}
    /// Tokens first..first+n-1 at those positions go to cells from `cell` on; then attention is done.
    void write(int first, int n, std::int64_t cell, bool trimmed = true) {
        std::vector<std::int32_t> pos(n), slots;
        std::vector<std::int64_t> to(n);
        std::iota(pos.begin(), pos.end(), first);
        std::iota(to.begin(), to.end(), cell);
        cells.place(to, pos);
        rows.add(to, cells, slots);
        tokens.resize(rows.slots().size());
        for (int i = 0; i < n; i++) tokens[static_cast<std::size_t>(slots[static_cast<std::size_t>(i)])] = pos[static_cast<std::size_t>(i)];
        if (trimmed) move(rows.trim(cells));
    }
    void move(std::span<const SlotMove> moves) {
        tokens.resize(std::max(tokens.size(), rows.slots().size()));
        for (const SlotMove& m : moves) tokens[static_cast<std::size_t>(m.to)] = tokens[static_cast<std::size_t>(m.from)];
        tokens.resize(rows.slots().size());
    }
    std::set<std::int64_t> kept() const {
        std::set<std::int64_t> s;
        for (const std::int64_t row : rows.slots()) EXPECT_TRUE(row < 0 || s.insert(row).second) << "twice: " << row;
        return s;
    }
    void expect_token(std::int64_t row, std::int32_t token) const {
        ASSERT_GE(rows.find(row), 0) << row;
        EXPECT_EQ(tokens[static_cast<std::size_t>(rows.find(row))], token) << row;
    }
    CellPositions cells;
    ExactRows rows;
    std::vector<std::int32_t> tokens;
};

std::set<std::int64_t> range(std::int64_t a, std::int64_t b) {
    std::set<std::int64_t> s;
    for (; a < b; a++) s.insert(a);
    return s;
}

}  // namespace

TEST(WindowSizes, DefaultIsAShareOfTheContext) {
    constexpr WindowForm halves = WindowForm::halves, residual = WindowForm::residual;
    EXPECT_EQ(WindowSizes{}.resolve(2048), (WindowSizes{4, 26, residual}));
    EXPECT_EQ(WindowSizes{}.resolve(8192), (WindowSizes{4, 116, residual}));
    EXPECT_EQ(WindowSizes{}.resolve(67), (WindowSizes{0, 0, residual}));
    EXPECT_EQ((WindowSizes{0, 0}).resolve(8192), (WindowSizes{0, 0, residual}));
    EXPECT_EQ((WindowSizes{WindowSizes::kAuto, 100}).resolve(8192), (WindowSizes{4, 100, residual}));
    // Where there are no residuals.
    EXPECT_EQ(WindowSizes{}.resolve(2048, false), (WindowSizes{2, 6, halves}));
    EXPECT_EQ(WindowSizes{}.resolve(8192, false), (WindowSizes{4, 28, halves}));
    EXPECT_EQ(WindowSizes{}.resolve(255, false), (WindowSizes{0, 0, halves}));
}

TEST(ExactRows, OneSideTakesTheOthersSlots) {
    // As after a restore: one side has more rows, in other slots.
    Store keys({2, 4}), values({2, 4});
    for (Store* s : {&keys, &values}) {
        std::vector<std::int32_t> pos(20);
        std::vector<std::int64_t> to(20);
        std::iota(pos.begin(), pos.end(), 0);
        std::iota(to.begin(), to.end(), 0);
        s->cells.place(to, pos);
    }
    const auto put = [](Store& s, std::initializer_list<int> rows) {
        for (const int row : rows) {
            const auto slot = static_cast<std::size_t>(s.rows.put(row));
            s.tokens.resize(std::max(s.tokens.size(), slot + 1));
            s.tokens[slot] = row;
        }
    };
    put(keys, {0, 1, 5, 6, 17, 18, 19}), put(values, {19, 0, 3, 18, 17});
    const auto arrange = [](Store& s, const Store& like) {
        const ExactRows::Arrangement a = s.rows.arrange(like.rows.slots());
        s.tokens.resize(40);
        for (const auto* moves : {&a.out, &a.in})
            for (const SlotMove& m : *moves) s.tokens[static_cast<std::size_t>(m.to)] = s.tokens[static_cast<std::size_t>(m.from)];
        for (const SlotMove& m : a.in)
            for (const SlotMove& n : a.in) EXPECT_NE(m.from, n.to) << "no slot is in both of a list";
    };
    arrange(values, keys), arrange(keys, values);
    EXPECT_TRUE(std::ranges::equal(keys.rows.slots(), values.rows.slots()));
    EXPECT_EQ(keys.kept(), (std::set<std::int64_t>{0, 17, 18, 19}));
    for (const int row : {0, 17, 18, 19}) keys.expect_token(row, row), values.expect_token(row, row);
}

TEST(ExactRows, KeepsSinkAndRecent) {
    for (const int batch : {1, 7, 100, 300}) {
        Store s({4, 10});
        for (int at = 0; at < 300; at += batch) s.write(at, std::min(batch, 300 - at), at);
        std::set<std::int64_t> expected = range(290, 300);
        expected.merge(range(0, 4));
        EXPECT_EQ(s.kept(), expected) << batch;
        s.expect_token(0, 0);
        s.expect_token(295, 295);
        EXPECT_LE(s.rows.bytes(), s.rows.full_bytes() + kEmbd * 2u) << "the store closes up";
    }
}

TEST(ExactRows, TheBatchStaysUntilAttentionIsDone) {
    Store s({0, 10});
    s.write(0, 50, 0);
    s.write(50, 100, 50, false);
    EXPECT_EQ(s.kept(), range(40, 150)) << "the batch's first token wants those before it";
    s.move(s.rows.trim(s.cells));
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
        s.expect_token(row, row < 30 ? static_cast<std::int32_t>(row) : static_cast<std::int32_t>(row - 30));
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
    s.move(s.rows.copy_stream(0, 1));
    EXPECT_EQ(s.kept(), (std::set<std::int64_t>{0, 17, 18, 19, kCells, kCells + 17, kCells + 18, kCells + 19}));
    s.expect_token(kCells + 19, 19);
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
TEST(StepPlan, TakesEachCellOnce) {
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
        for (int j = n - n_tokens + t + 1; j < n; j++) mask[t * n + j] = kMaskHidden;
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
        std::vector<std::int32_t> pos(n), k_slots, v_slots;
        std::iota(rows.begin(), rows.end(), 0), std::iota(pos.begin(), pos.end(), 0);
        cells.place(rows, pos);
        ExactRows ke(w, kEmbd, kCells, 1), ve(w, kEmbd, kCells, 1);
        ve.put(50);  // a slot that the keys do not have
        ke.add(rows, cells, k_slots), ve.add(rows, cells, v_slots);
        std::vector<std::uint16_t> halves[2];
        for (auto& h : halves) h.resize((n + 1) * kEmbd);
        for (int i = 0; i < n * kEmbd; i++) {
            halves[0][k_slots[i / kEmbd] * kEmbd + i % kEmbd] = to_half(exact_from[i]);
            halves[1][v_slots[i / kEmbd] * kEmbd + i % kEmbd] = to_half(exact_from[i]);
        }
        SerialExecutor executor;
        StepPlans plans;
        const StepMask step{nullptr, a.mask, a.mask_token_stride, a.mask_head_stride, 1, n_tokens, n, 0};
        AttentionArgs call = a;
        plans.find(executor, step, cells, &ke, &ve, true).set_exact(call);
        EXPECT_EQ(&plans.find(executor, step, cells, &ke, &ve, false), &plans.find(executor, step, cells, &ke, &ve, true)) << "made once";
        call.exact.k = reinterpret_cast<const std::uint8_t*>(halves[0].data()),
        call.exact.v = reinterpret_cast<const std::uint8_t*>(halves[1].data());
        call.exact.k_stride = call.exact.v_stride = 2 * kEmbd;
        call.exact.q = a.q, call.exact.q_token_stride = a.q_token_stride, call.exact.q_head_stride = a.q_head_stride;
        attention(kernels(), call);
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

// Layers share a plan as long as all that it was made of is the same, and no longer.
TEST(StepPlan, IsMadeAgainWhenItsBasisChanges) {
    constexpr int n = 40;
    CellPositions cells(kCells, 1);
    std::vector<std::int64_t> rows(n);
    std::vector<std::int32_t> pos(n), slots;
    std::iota(rows.begin(), rows.end(), 0), std::iota(pos.begin(), pos.end(), 0);
    cells.place(rows, pos);
    ExactRows k({0, 4}, kEmbd, kCells, 1), other({0, 4}, kEmbd, kCells, 1);
    k.add(rows, cells, slots), k.trim(cells), other.add(rows, cells, slots), other.trim(cells);
    std::vector<std::uint16_t> mask(n, 0);
    const int name = 0, name_2 = 0;
    StepMask step{&name, mask.data(), n, n, 1, 1, n, 0};
    SerialExecutor executor;
    StepPlans plans;
    const auto exact = [&](const ExactRows& e) { return plans.find(executor, step, cells, &e, &e, true).exact_mask; };
    const auto hidden = [&](const std::vector<std::uint16_t>& m) { return std::ranges::count(m, kMaskHidden); };
    EXPECT_EQ(exact(k), std::vector<std::uint16_t>(exact(other))) << "of another layer";
    EXPECT_EQ(hidden(exact(k)), 0) << "all that is kept is in the window";
    mask[n - 2] = kMaskHidden;
    EXPECT_EQ(hidden(exact(k)), 0) << "the plan of the graph";
    step.id = &name_2;
    EXPECT_EQ(hidden(exact(k)), 1) << "another mask in the same memory";
    mask[n - 3] = kMaskHidden;
    plans.begin_graph();
    EXPECT_EQ(hidden(exact(k)), 2) << "another graph";
    other.forget(n - 4, 1);
    EXPECT_EQ(exact(other).size(), exact(k).size() - 1) << "another layer with other rows";
    cells.place(std::vector<std::int64_t>{n - 4}, std::vector<std::int32_t>{500});
    EXPECT_EQ(plans.find(executor, step, cells, &k, &k, true).cell_pos[n - 4], 500) << "a cell was written";
}
