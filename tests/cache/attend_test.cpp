// Attention through a layer's cache, over every store: prompts and single tokens, offsets, scales, exact windows, two streams, a shared
// unified stream. The store by the scalar specification is the
// measure of the others; the CPU's has int8 levels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "tests/cache/stores.h"
#include "turboquant/cache/cuda/queue.h"
#include "turboquant/cache/layer_cache.h"

namespace turboquant {
namespace {

using namespace turboquant::test;

constexpr int kDim = 64, kHeadsKv = 2, kHeads = 4, kCells = 512;

struct Case {
    const char* name;
    CodecId k = CodecId::turbo4, v = CodecId::turbo4;
    WindowSizes windows{0, 0};
    bool offset = true, scales = false, sequences = false;
};

/// A layer's cache with its memory, over one kind of store.
class Layer {
  public:
    Layer(StoreKind kind, const Case& c, bool twice = false) : cells_(kCells, 1), layer_(cells_) {
        cells_.limit_offsets(4);
        make(layer_, memory_, kind, c);
        if (twice) make(second_.emplace(cells_), memory_, kind, c);
        ctx_.store.executor = &executor_;
    }
    static void make(LayerCache& layer, std::vector<std::vector<std::uint8_t>>& memory_of, StoreKind kind, const Case& c,
                     std::int64_t n_streams = 1) {
        for (const Side side : {Side::key, Side::value}) {
            KvGeometry g{side, side == Side::key ? c.k : c.v, default_norm_mode(side), kDim * kHeadsKv, kCells, n_streams};
            g.windows = c.windows;
            auto& memory = memory_of.emplace_back(reserved_bytes(g) + 64);
            auto* at = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
            StoreFactory store = cpu_store_in(at);
            if (kind == StoreKind::spec) store = [](const Layout& layout) { return std::make_unique<SpecStore>(layout); };
            if (kind == StoreKind::cuda) store = cuda_store_in(at, 0);
            layer.set_tensor(g, std::move(store));
        }
        LayerCache::KeyTreatment keys{c.offset, {}};
        std::string letters;
        letters.resize(c.scales ? kDim * kHeadsKv : 0);
        // Split pairs: a pair has one scale.
        for (int i = 0; c.scales && i < kDim * kHeadsKv; i++) letters[i] = static_cast<char>('K' + i % (kDim / 2) % 5);
        keys.scales = letters;
        layer.bind(Side::key, kDim, keys);
        layer.bind(Side::value, kDim, keys);
        RopeParams rope;
        rope.n_dims = kDim, rope.pairs = RopePairs::split;
        layer.set_rope(rope);
    }

    /// Tokens at cells first.., positions pos[i]; attention of all of them by `mask` ([tokens][n_kv]).
    std::vector<float> step(int first, const std::vector<std::int32_t>& pos, std::vector<float> k, std::vector<float> v,
                            const std::vector<float>& q, const std::vector<std::uint16_t>& mask, int n_kv) {
        std::vector<float> out(pos.size() * kHeads * kDim, NAN);
        step(first, pos, k, v, q, mask, n_kv, out);
        return out;
    }
    void step(int first, const std::vector<std::int32_t>& pos, std::vector<float>& k, std::vector<float>& v, const std::vector<float>& q,
              const std::vector<std::uint16_t>& mask, int n_kv, std::vector<float>& out) {
        const auto n = pos.size();
        std::vector<std::int64_t> rows(n);
        for (std::size_t i = 0; i < n; i++) rows[i] = first + static_cast<std::int64_t>(i);
        ctx_.plans.begin_graph();
        attend(layer_, rows, pos, k, v, q, mask, n_kv, out);
        if (!second_) return;
        if (between_) between_();
        attend(*second_, rows, pos, k, v, q, mask, n_kv, out);
    }
    void attend(LayerCache& layer, const std::vector<std::int64_t>& rows, const std::vector<std::int32_t>& pos, std::vector<float>& k,
                std::vector<float>& v, const std::vector<float>& q, const std::vector<std::uint16_t>& mask, int n_kv,
                std::vector<float>& out) {
        EXPECT_TRUE(layer.write_keys(ctx_, {k.data(), kDim * kHeadsKv, rows, {}, {}}, pos));
        EXPECT_TRUE(layer.write_values(ctx_, {v.data(), kDim * kHeadsKv, rows, {}, {}}));
        // Else a GPU would have to move rows before it attends, and attend to the new ones in another way.
        const ExactRows *of_keys = layer.tensor(Side::key).exact(), *of_values = layer.tensor(Side::value).exact();
        EXPECT_TRUE(!of_keys || std::ranges::equal(of_keys->slots(), of_values->slots())) << "keys and values in different slots";
        AttentionArgs a;
        a.n_head = kHeads, a.n_head_kv = kHeadsKv, a.n_tokens = static_cast<int>(rows.size()), a.n_kv = n_kv, a.v_dim_out = kDim;
        a.q_token_stride = a.out_token_stride = kHeads * kDim, a.q_head_stride = a.out_head_stride = kDim;
        a.mask_token_stride = n_kv, a.scale = 0.125f;
        const StreamQuery query{q.data(), out.data(), mask.data(), nullptr, mask.data()};
        const char* error = layer.attend(ctx_, a, 0, {&query, 1});
        EXPECT_EQ(error, nullptr) << error;
    }

    /// What step() gave as a graph.
    struct Given {
        Launches launches;
        bool waited = true;       ///< to the last; else only the rest of them
        std::size_t n_early = 0;  ///< launches besides that may be done early
    };
    /// step() on the store of GPUs, as a graph that waits for its launches, done by the end. What may be done early is, as soon as the layers before
    /// are through.
    template <class... Args>
    Given graph(Args&&... args) {
        Queue& queue = Queue::of(ctx_.store, 0);
        Given given;
        std::size_t done = 0;
        const auto give = [&](const Launches& launches, std::size_t end, std::size_t end_early) {
            EXPECT_TRUE(queue.earlies().run(given.n_early, end_early, queue.lanes()).ok());
            EXPECT_TRUE(launches.run(done, end, queue.lanes()).ok());
            done = end, given.n_early = end_early;
        };
        struct Mark {
            std::size_t launches, early;
        };
        std::vector<Mark> marks;
        const auto give_all = [&](const Launches& launches) {
            for (const Mark& m : marks) give(launches, m.launches, m.early);
            marks.clear();
            give(launches, launches.size(), queue.earlies().size());
        };
        between_ = [&] {
            if (queue.deferring()) marks.push_back({queue.waiting().size(), queue.earlies().size()});
            queue.other_work();
        };
        queue.begin_graph();
        queue.defer([&] { given.waited = false, give_all(queue.take()); });
        step(std::forward<Args>(args)...);
        queue.settle();
        if (given.waited) give_all(given.launches = queue.take());
        queue.end_graph();
        between_ = {};
        return given;
    }
    std::vector<std::uint8_t> saved(Side side, int n) {
        std::vector<std::uint8_t> rows(sizeof(std::uint16_t) * kDim * kHeadsKv * n);
        layer_.save(ctx_.store, side, 0, rows.size(), rows.data());
        return rows;
    }

    void clear() {
        for (auto& memory : memory_) std::ranges::fill(memory, std::uint8_t{0});
        cells_.clear(), layer_.clear();
        if (second_) second_->clear();
    }

    /// Takes over the first n cells of another, as llama.cpp saves and restores them.
    void restore_from(Layer& other, int n) {
        for (const Side side : {Side::key, Side::value}) {
            const std::vector<std::uint8_t> rows = other.saved(side, n);
            EXPECT_EQ(layer_.restore(ctx_.store, side, 0, rows.size(), rows.data()), RestoreResult::ok);
            if (!second_) continue;
            EXPECT_EQ(second_->restore(ctx_.store, side, 0, rows.size(), rows.data()), RestoreResult::ok);
        }
    }

  private:
    CellPositions cells_;
    LayerCache layer_;
    std::optional<LayerCache> second_;
    std::function<void()> between_;
    std::vector<std::vector<std::uint8_t>> memory_;
    SerialExecutor executor_;
    CacheContext ctx_;
};

std::vector<float> gaussian(std::mt19937& rng, std::size_t n, float offset) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (std::size_t i = 0; i < n; i++) x[i] = normal(rng) + offset * static_cast<float>(std::sin(0.7 * static_cast<double>(i % 128)));
    return x;
}

double error_of(const std::vector<float>& x, const std::vector<float>& of) {
    double diff = 0, norm = 0;
    for (std::size_t i = 0; i < x.size(); i++) diff += std::pow(x[i] - of[i], 2), norm += std::pow(of[i], 2);
    return std::sqrt(diff / norm);
}

class Attends : public testing::TestWithParam<Case> {};

TEST_P(Attends, AsSpecified) {
    for (const StoreKind kind : {StoreKind::cpu, StoreKind::cuda}) {
        SCOPED_TRACE(testing::PrintToString(kind));
        std::mt19937 rng(7);
        Layer spec(StoreKind::spec, GetParam()), other(kind, GetParam());
        int cell = 0, pos[2] = {0, 0};
        std::vector<int> sequence;
        const auto step = [&](int n, int of) {
            std::vector<std::int32_t> at;
            for (int i = 0; i < n; i++) at.push_back(pos[of]++), sequence.push_back(of);
            const int n_kv = (cell + n + 63) / 64 * 64;
            std::vector<std::uint16_t> mask(static_cast<std::size_t>(n) * n_kv, kMaskHidden);
            for (int i = 0; i < n; i++)
                for (int j = 0; j <= cell + i; j++)
                    if (sequence[j] == of) mask[static_cast<std::size_t>(i) * n_kv + j] = 0;
            const auto k = gaussian(rng, static_cast<std::size_t>(n) * kDim * kHeadsKv, 2), v = gaussian(rng, k.size(), 0),
                       q = gaussian(rng, static_cast<std::size_t>(n) * kDim * kHeads, 0);
            const auto a = spec.step(cell, at, k, v, q, mask, n_kv), b = other.step(cell, at, k, v, q, mask, n_kv);
            cell += n;
            EXPECT_LT(error_of(b, a), kind == StoreKind::cpu ? 3e-2 : 1e-3) << n << " tokens, " << cell << " cells";
        };
        step(5, 0);
        step(1, 0);
        step(90, 0);
        if (GetParam().sequences) step(70, 1);
        for (int i = 0; i < 12; i++) step(1, 0);
        if (GetParam().sequences) step(3, 1);
        step(20, 0);
        step(8, 0);
        step(1, 0);
    }
}

// Fewer tokens than an offset is measured on, more than windows hold: all of their keys are saved exactly, values only of the windows.
TEST_P(Attends, AsBeforeAfterAShortStateIsRestored) {
    if (!GetParam().offset && GetParam().windows.any())
        GTEST_SKIP() << "positions come back with offsets: without, rows of windows come back as codes";
    for (const StoreKind kind : {StoreKind::cpu, StoreKind::spec, StoreKind::cuda})
        for (const int n : {1, 5, 40}) {
            SCOPED_TRACE(testing::PrintToString(kind) + " " + std::to_string(n));
            std::mt19937 rng(n);
            Layer one(kind, GetParam()), two(kind, GetParam());
            const auto values = [&](int tokens, int heads, float offset) {
                return gaussian(rng, static_cast<std::size_t>(tokens) * kDim * heads, offset);
            };
            const auto causal = [](int first, int tokens) {
                std::vector<std::uint16_t> mask(static_cast<std::size_t>(tokens) * 64, kMaskHidden);
                for (int t = 0; t < tokens; t++) std::fill_n(mask.begin() + t * 64, first + t + 1, std::uint16_t{0});
                return mask;
            };
            std::vector<std::int32_t> pos(n);
            std::iota(pos.begin(), pos.end(), 0);
            one.step(0, pos, values(n, kHeadsKv, 2), values(n, kHeadsKv, 0), values(n, kHeads, 0), causal(0, n), 64);
            two.restore_from(one, n);
            for (int i = n; i < n + 3; i++) {
                const auto k = values(1, kHeadsKv, 2), v = values(1, kHeadsKv, 0), q = values(1, kHeads, 0);
                EXPECT_EQ(two.step(i, {i}, k, v, q, causal(i, 1), 64), one.step(i, {i}, k, v, q, causal(i, 1), 64)) << i;
            }
        }
}

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
        std::ranges::fill(mask, kMaskHidden);
        for (int t = 0; t < n; t++) std::fill_n(mask.begin() + t * n_kv, first + t + 1, std::uint16_t{0});
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
        if (pos > recent + 3 * n_tokens) EXPECT_TRUE(given.waited && given.launches == last) << pos;
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
    std::vector<std::uint16_t> mask(n_tokens * n_kv, kMaskHidden);
    for (int t = 0; t < n_tokens; t++) std::fill_n(mask.begin() + t * n_kv, t + 1, std::uint16_t{0});
    const auto run = [&](bool over) {
        CellPositions cells(kCells, n_streams);
        LayerCache layer(cells);
        std::vector<std::vector<std::uint8_t>> memory;
        Layer::make(layer, memory, StoreKind::cuda, {"", CodecId::turbo4, CodecId::turbo4, {4, 40}}, n_streams);
        SerialExecutor executor;
        CacheContext ctx;
        ctx.store.executor = &executor;
        ctx.plans.begin_graph();
        Queue& queue = Queue::of(ctx.store, 0);
        const auto give = [&] {
            const Launches& launches = queue.take();
            EXPECT_TRUE(queue.earlies().run(0, queue.earlies().size(), queue.lanes()).ok());
            EXPECT_TRUE(launches.run(0, launches.size(), queue.lanes()).ok());
        };
        queue.begin_graph();
        queue.defer(give);
        std::vector<float> graph(3 * of_stream);  // the rows of keys, then results of the second stream; of the first where it says
        std::ranges::copy(k, graph.begin());
        std::vector<std::int64_t> rows;
        std::vector<std::int32_t> pos;
        for (int s = 0; s < n_streams; s++)
            for (int t = 0; t < n_tokens; t++) rows.push_back(s * kCells + t), pos.push_back(t);
        EXPECT_TRUE(layer.write_keys(ctx, {graph.data(), row, rows, {}, {}}, pos));
        EXPECT_TRUE(layer.write_values(ctx, {v.data(), row, rows, {}, {}}));
        AttentionArgs a;
        a.n_head = kHeads, a.n_head_kv = kHeadsKv, a.n_tokens = n_tokens, a.n_kv = n_kv, a.v_dim_out = kDim;
        a.q_token_stride = a.out_token_stride = kHeads * kDim, a.q_head_stride = a.out_head_stride = kDim;
        a.mask_token_stride = n_kv, a.scale = 0.125f;
        float *first = graph.data() + (over ? 0 : 2 * of_stream), *second = graph.data() + of_stream;
        const StreamQuery queries[] = {{q.data(), first, mask.data(), nullptr, mask.data()},
                                       {q.data() + of_stream, second, mask.data(), nullptr, mask.data()}};
        EXPECT_EQ(layer.attend(ctx, a, 0, queries), nullptr);
        queue.settle();
        if (queue.deferring()) give();
        queue.end_graph();
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

INSTANTIATE_TEST_SUITE_P(Cases, Attends,
                         testing::Values(Case{"plain", CodecId::turbo4, CodecId::turbo4, {0, 0}, false}, Case{"offset"},
                                         Case{"windows", CodecId::turbo4, CodecId::turbo3, {4, 16}},
                                         Case{"one_recent", CodecId::turbo4, CodecId::turbo4, {0, 1}},
                                         Case{"windows_alone", CodecId::turbo4, CodecId::turbo4, {4, 16}, false},
                                         Case{"scales", CodecId::turbo4, CodecId::turbo4, {0, 0}, true, true},
                                         Case{"all", CodecId::tcq3, CodecId::turbo4, {4, 16}, true, true, true},
                                         Case{"sequences", CodecId::turbo4, CodecId::turbo4, {0, 0}, true, false, true}),
                         [](const auto& i) { return std::string(i.param.name); });

}  // namespace
}  // namespace turboquant
