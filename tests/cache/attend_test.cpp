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
    static void make(LayerCache& layer, std::vector<std::vector<std::uint8_t>>& memory_of, StoreKind kind, const Case& c) {
        for (const Side side : {Side::key, Side::value}) {
            KvGeometry g{side, side == Side::key ? c.k : c.v, default_norm_mode(side), kDim * kHeadsKv, kCells, 1};
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

    /// The same as a graph that waits for its launches, on the store of GPUs: what they were, done by the end. `waits`: they did to the last. What
    /// may be done early is, as soon as the layers before are through.
    Launches graph(Queue& queue, bool& waits, const std::function<void()>& verbs) {
        std::size_t done = 0, early = 0;
        const auto give = [&](const Launches& launches, std::size_t end, std::size_t end_early) {
            EXPECT_TRUE(queue.earlies().run(early, end_early, queue.lanes()).ok());
            EXPECT_TRUE(launches.run(done, end, queue.lanes()).ok());
            done = end, early = end_early;
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
        waits = true;
        queue.begin_graph();
        queue.defer([&] { waits = false, give_all(queue.take()); });
        verbs();
        queue.settle();
        Launches all;
        if (waits) give_all(all = queue.take());
        n_early_ = early;
        queue.end_graph();
        between_ = {};
        return all;
    }
    std::size_t n_early() const { return n_early_; }
    Queue& queue() { return Queue::of(ctx_.store, 0); }
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
    std::size_t n_early_ = 0;  ///< of the last graph
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

// Steps of a fresh sequence are one graph of a GPU, the first one's second on and all of others: also where its offset is measured, frozen at last,
// and windows begin to let go of rows; after the cache was cleared, or over what is left of another sequence; and after a state is restored.
// They leave what a sequence leaves that is not given as graphs.
TEST(AttendsInGraphs, AFreshSequencesLaunchesStayTheSame) {
    if (!Launches::kComparable) GTEST_SKIP() << "this compiler cannot clear padding, by which lists of launches differ";
    constexpr int n_kv = 128, n_tokens = 84;
    const Case c{"", CodecId::turbo4, CodecId::turbo3, {4, 72}};
    Layer one(StoreKind::cuda, c), other(StoreKind::cuda, c);
    std::mt19937 rng(1);
    // Lists are compared by addresses, too.
    std::vector<float> k(kDim * kHeadsKv), v(k.size()), q(kDim * kHeads), out(q.size());
    std::vector<std::uint16_t> mask(n_kv, kMaskHidden);
    Launches before;
    for (int i = 0; i < 3 * n_tokens; i++) {
        const int pos = i % n_tokens;
        if (pos == 0) std::ranges::fill(mask, kMaskHidden);
        if (i == 2 * n_tokens) one.clear(), other.clear();
        for (auto& [to, offset] : {std::pair{&k, 2}, {&v, 0}, {&q, 0}}) std::ranges::copy(gaussian(rng, to->size(), offset), to->begin());
        mask[pos] = 0;
        const std::vector<float> expected = other.step(pos, {pos}, k, v, q, mask, n_kv);
        bool waits = false;
        Launches launches = one.graph(one.queue(), waits, [&] { one.step(pos, {pos}, k, v, q, mask, n_kv, out); });
        EXPECT_EQ(out, expected) << i;
        if (i < 2) before = std::move(launches);
        // Where a window lets go of its first row, what is left of the sequence before makes the slots be closed up.
        if (i < 2 || (i / n_tokens == 1 && pos >= 72)) continue;
        EXPECT_TRUE(waits) << i;
        EXPECT_TRUE(launches == before) << i;
        if (pos + 1 < n_tokens) continue;
        for (const Side side : {Side::key, Side::value}) EXPECT_EQ(one.saved(side, n_tokens), other.saved(side, n_tokens));
    }
    EXPECT_GT(before.size(), 3u);
    one.clear(), one.restore_from(other, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 10; pos++) {
        mask[pos] = 0;
        bool waits = false;
        EXPECT_TRUE(one.graph(one.queue(), waits, [&] { one.step(pos, {pos}, k, v, q, mask, n_kv, out); }) == before)
            << "after a restore " << pos;
    }
}

// Rows that a restore leaves to be moved or encoded are where attention reads them, however early that begins.
TEST(AttendsInGraphs, WhatARestoreLeavesComesBeforeAttention) {
    constexpr int n_kv = 128, n_tokens = 72;
    const Case c{"", CodecId::turbo4, CodecId::turbo3, {2, 66}};
    Layer one(StoreKind::cuda, c, true), other(StoreKind::cuda, c, true), saved(StoreKind::cuda, c);
    std::mt19937 rng(2);
    std::vector<float> k(kDim * kHeadsKv), v(k.size()), q(kDim * kHeads), out(q.size());
    std::vector<std::uint16_t> mask(n_kv, kMaskHidden);
    std::size_t n_early = 0;
    const auto step = [&](int pos) {
        for (auto& [to, by] : {std::pair{&k, 2}, {&v, 0}, {&q, 0}}) std::ranges::copy(gaussian(rng, to->size(), by), to->begin());
        std::ranges::fill(mask, kMaskHidden);
        std::fill_n(mask.begin(), pos + 1, std::uint16_t{0});
        const std::vector<float> expected = other.step(pos, {pos}, k, v, q, mask, n_kv);
        bool waits = false;
        one.graph(one.queue(), waits, [&] { one.step(pos, {pos}, k, v, q, mask, n_kv, out); });
        n_early += one.n_early();
        EXPECT_EQ(out, expected) << pos;
    };
    for (int pos = 0; pos < n_tokens; pos++) step(pos);
    saved.restore_from(other, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 12; pos++) step(pos);
    EXPECT_GT(n_early, 50u);
    one.restore_from(saved, n_tokens), other.restore_from(saved, n_tokens);
    for (int pos = n_tokens; pos < n_tokens + 3; pos++) step(pos);
}

// A prompt of few tokens whose first queries read compressed keys has its offset before these are encoded, as a longer one.
TEST(AttendsInGraphs, AShortPromptKnowsItsOffset) {
    constexpr int n_kv = 64, n_tokens = 20;
    const Case c{"", CodecId::turbo2, CodecId::turbo4, {2, 6}};
    Layer one(StoreKind::cuda, c), other(StoreKind::cuda, c);
    std::mt19937 rng(3);
    std::vector<std::int32_t> pos(n_tokens);
    std::iota(pos.begin(), pos.end(), 0);
    std::vector<float> k = gaussian(rng, kDim * kHeadsKv * n_tokens, 2), v = gaussian(rng, k.size(), 0),
                       q = gaussian(rng, kDim * kHeads * n_tokens, 0), out(q.size());
    std::vector<std::uint16_t> mask(n_kv * n_tokens, kMaskHidden);
    for (int t = 0; t < n_tokens; t++) std::fill_n(mask.begin() + t * n_kv, t + 1, std::uint16_t{0});
    const std::vector<float> expected = other.step(0, pos, k, v, q, mask, n_kv);
    bool waits = false;
    one.graph(one.queue(), waits, [&] { one.step(0, pos, k, v, q, mask, n_kv, out); });
    EXPECT_EQ(out, expected);
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
