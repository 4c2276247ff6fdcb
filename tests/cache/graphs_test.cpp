// Attention through a layer's cache as GPUs do it: launches wait in lists, which become CUDA graphs where they stay the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "tests/cache/layer_rig.h"

namespace turboquant {
namespace {

using namespace turboquant::test;

/// Two layers, or pairs of them, of one content: one is given graphs.
struct InGraphs {
    Layer one, other;
    std::mt19937 rng{1};
    // Lists are compared by addresses, too.
    std::vector<float> k, v, q, out;
    std::vector<std::uint16_t> mask;

    InGraphs(const Case& c, bool twice, int n_tokens, int n_kv)
        : one(StoreKind::cuda, c, twice),
          other(StoreKind::cuda, c, twice),
          k(kDim * kHeadsKv * n_tokens),
          v(k.size()),
          q(kDim * kHeads * n_tokens),
          out(q.size()),
          mask(n_kv * n_tokens) {}
    /// Tokens at cells and positions from `first` on, which see those up to themselves: the same comes of both.
    Layer::Given step(int first) {
        const int n = static_cast<int>(k.size()) / (kDim * kHeadsKv), n_kv = static_cast<int>(mask.size()) / n;
        for (auto& [to, offset] : {std::pair{&k, 2}, {&v, 0}, {&q, 0}}) std::ranges::copy(gaussian(rng, to->size(), offset), to->begin());
        std::vector<std::int32_t> pos(n);
        std::iota(pos.begin(), pos.end(), first);
        std::ranges::copy(causal_mask(first, n, n_kv), mask.begin());
        const std::vector<float> expected = other.step(first, pos, k, v, q, mask, n_kv);
        Layer::Given given = one.graph(first, pos, k, v, q, mask, n_kv, out);
        EXPECT_EQ(out, expected) << first;
        return given;
    }
};

// Steps of a fresh sequence are one graph of a GPU, the first one's second on and all of others: also where its offset is measured, frozen at last,
// and windows begin to let go of rows; after the cache was cleared, or over what is left of another sequence; and after a state is restored.
// They leave what a sequence leaves that is not given as graphs.
TEST(AttendsInGraphs, AFreshSequencesLaunchesStayTheSame) {
    if (!Launches::kComparable) GTEST_SKIP() << "this compiler cannot clear padding, by which lists of launches differ";
    constexpr int n_tokens = 84, recent = 72;
    InGraphs both({"", CodecId::turbo4, CodecId::turbo3, {4, recent}}, false, 1, 128);
    Launches first;
    for (int i = 0; i < 3 * n_tokens; i++) {
        const int pos = i % n_tokens;
        if (i == 2 * n_tokens) both.one.clear(), both.other.clear();
        Layer::Given given = both.step(pos);
        if (i < 2) first = std::move(given.launches);
        // Where a window lets go of its first row, what is left of the sequence before makes the slots be closed up.
        if (i >= 2 && (i / n_tokens != 1 || pos < recent)) {
            EXPECT_TRUE(given.waited) << i;
            EXPECT_TRUE(given.launches == first) << i;
        }
        if (pos + 1 < n_tokens) continue;
        for (const Side side : {Side::key, Side::value}) EXPECT_EQ(both.one.saved(side, n_tokens), both.other.saved(side, n_tokens));
    }
    EXPECT_GT(first.size(), 3u);
    Layer saved(StoreKind::cuda, {"", CodecId::turbo4, CodecId::turbo3, {4, recent}});
    saved.restore_from(both.other, n_tokens);
    both.one.clear(), both.other.clear();
    both.one.restore_from(saved, n_tokens), both.other.restore_from(saved, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 10; pos++) EXPECT_TRUE(both.step(pos).launches == first) << "after a restore " << pos;
}

/// Up to where an offset is measured: a graph leaves that until it is done, so that its own attention sees other codes than without one.
constexpr int kBeforeOffset = 31;

// A piece that ends between two layers leaves the first one's rows to be encoded with the other's: the same comes of it, and is saved.
TEST(AttendsInGraphs, PiecesLeaveRowsToBeEncoded) {
    constexpr int n_tokens = kBeforeOffset;
    InGraphs both({"", CodecId::turbo4, CodecId::turbo3, {4, 20}}, true, 1, 128);
    both.one.in_pieces = true;
    for (int pos = 0; pos < n_tokens; pos++) both.step(pos);
    for (const Side side : {Side::key, Side::value}) EXPECT_EQ(both.one.saved(side, n_tokens), both.other.saved(side, n_tokens));
}

// Rows are read where the model made them within their graph only: an attention in the next one takes them from windows and codes.
TEST(AttendsInGraphs, RowsOfAnotherGraphAreNotReadWhereTheyWereMade) {
    InGraphs both({"", CodecId::turbo4, CodecId::turbo3, {4, 20}}, false, 1, 128);
    both.other.looks_later = true;
    for (int pos = 0; pos < kBeforeOffset; pos++) both.step(pos);
}

// Those of drafts of one length, too, once windows are full: exact rows take the slots of those that left, and nothing moves.
TEST(AttendsInGraphs, DraftsLaunchesStayTheSame) {
    if (!Launches::kComparable) GTEST_SKIP() << "this compiler cannot clear padding, by which lists of launches differ";
    constexpr int n_tokens = 17, n_kv = 256, recent = 70;
    InGraphs both({"", CodecId::turbo4, CodecId::turbo4, {4, recent}}, false, n_tokens, n_kv);
    Launches last;
    std::size_t before_windows_are_full = 0;
    for (int pos = 0; pos + n_tokens <= n_kv; pos += n_tokens) {
        Layer::Given given = both.step(pos);
        if (pos == n_tokens) before_windows_are_full = given.launches.size();
        if (pos > recent + 3 * n_tokens) {
            EXPECT_TRUE(given.waited && given.launches == last) << pos;
        }
        last = std::move(given.launches);
    }
    EXPECT_GT(last.size(), 3u);
    EXPECT_EQ(last.size(), before_windows_are_full);
}

// Rows that a restore leaves to be moved or encoded are where attention reads them, however early that begins.
TEST(AttendsInGraphs, WhatARestoreLeavesComesBeforeAttention) {
    constexpr int n_tokens = 72;
    const Case c{"", CodecId::turbo4, CodecId::turbo3, {2, 66}};
    InGraphs both(c, true, 1, 128);
    Layer saved(StoreKind::cuda, c);
    std::size_t n_early = 0;
    for (int pos = 0; pos < n_tokens; pos++) n_early += both.step(pos).n_early;
    saved.restore_from(both.other, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 12; pos++) n_early += both.step(pos).n_early;
    EXPECT_GT(n_early, 50u);
    both.one.restore_from(saved, n_tokens), both.other.restore_from(saved, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 3; pos++) both.step(pos);
}

// A prompt of few tokens whose first queries read compressed keys has its offset before these are encoded, as a longer one.
TEST(AttendsInGraphs, AShortPromptKnowsItsOffset) {
    InGraphs both({"", CodecId::turbo2, CodecId::turbo4, {2, 6}}, false, 20, 64);
    both.step(0);
}

// Two streams' drafts, of which the first one's result lies where the rows of both were made.
TEST(AttendsInGraphs, OverwrittenRowsAreNotReadForTheNextStream) {
    constexpr int n_tokens = 12, n_streams = 2, n_kv = 64;
    std::mt19937 rng(3);
    const std::size_t row = kDim * kHeadsKv, of_stream = n_tokens * kHeads * kDim;
    const auto q = gaussian(rng, n_streams * of_stream, 0), k = gaussian(rng, n_streams * n_tokens * row, 2),
               v = gaussian(rng, k.size(), 0);
    ASSERT_EQ(of_stream, k.size());
    const std::vector<std::uint16_t> mask = causal_mask(0, n_tokens, n_kv);
    const auto run = [&](bool over) {
        CellPositions cells(kCells, n_streams);
        LayerCache layer(cells);
        std::vector<std::vector<std::uint8_t>> memory;
        Layer::make(layer, memory, StoreKind::cuda, {"", CodecId::turbo4, CodecId::turbo4, {4, 40}}, n_streams);
        SerialExecutor executor;
        CacheContext ctx;
        ctx.store.executor = &executor;
        ctx.plans.begin_graph();
        std::vector<float> graph(3 * of_stream);  // the rows of keys, then results of the second stream; of the first where it says
        std::ranges::copy(k, graph.begin());
        std::vector<std::int64_t> rows;
        std::vector<std::int32_t> pos;
        for (int s = 0; s < n_streams; s++)
            for (int t = 0; t < n_tokens; t++) rows.push_back(s * kCells + t), pos.push_back(t);
        EXPECT_TRUE(layer.write_keys(ctx, {graph.data(), row, rows, {}, {}}, pos));
        EXPECT_TRUE(layer.write_values(ctx, {v.data(), row, rows, {}, {}}));
        float *first = graph.data() + (over ? 0 : 2 * of_stream), *second = graph.data() + of_stream;
        const StreamQuery queries[] = {{q.data(), first, mask.data(), nullptr, mask.data()},
                                       {q.data() + of_stream, second, mask.data(), nullptr, mask.data()}};
        EXPECT_EQ(layer.attend(ctx, call_of(n_tokens, n_kv), 0, queries), nullptr);
        std::vector<float> out(first, first + of_stream);
        out.insert(out.end(), second, second + of_stream);
        return out;
    };
    EXPECT_LT(error_of(run(true), run(false)), 1e-3);
}

// Attention waits for a batch's codes also where all that waited was given before it (memory grew).
TEST(AttendsInGraphs, CodesOfABatchAreAwaitedWheneverTheyWereGiven) {
    Queue q(0);
    cuda::EncodePlan keys, values;
    values.side = Side::value;
    for (const bool grows : {false, true}) {
        q.defer([&] {
            const Launches& launches = q.take();
            must(launches.run(0, launches.size(), q.lanes()));
        });
        EXPECT_EQ(q.codes_ready(), nullptr);
        q.encode_batch(keys, {});
        EXPECT_TRUE(q.other_side_waits(Side::value));
        EXPECT_FALSE(q.other_side_waits(Side::key));
        q.encode_batch(values, {});
        EXPECT_FALSE(q.other_side_waits(Side::key)) << "both sides wait";
        if (grows) q.catch_up();
        EXPECT_NE(q.codes_ready(), nullptr);
        q.codes_awaited();
        EXPECT_EQ(q.codes_ready(), nullptr) << "by then the main stream waits";
        q.encode_batch(keys, {});
        q.settle_batch();
        EXPECT_EQ(q.codes_ready(), nullptr);
        q.take();
    }
}

}  // namespace
}  // namespace turboquant
