// A layer's cache with its memory, over one kind of store, as attention through it is tested.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <random>
#include <vector>

#include "tests/cache/stores.h"
#include "turboquant/cache/cuda/queue.h"
#include "turboquant/cache/layer_cache.h"

namespace turboquant::test {

inline constexpr int kDim = 64, kHeadsKv = 2, kHeads = 4, kCells = 512;

struct Case {
    const char* name;
    CodecId k = CodecId::turbo4, v = CodecId::turbo4;
    WindowSizes windows{0, 0};
    bool offset = true, scales = false, sequences = false;
};

/// What of a call over a layer's cache is the same for all.
inline AttentionArgs call_of(int n_tokens, int n_kv) {
    AttentionArgs a;
    a.n_head = kHeads, a.n_head_kv = kHeadsKv, a.n_tokens = n_tokens, a.n_kv = n_kv, a.v_dim_out = kDim;
    a.q_token_stride = a.out_token_stride = kHeads * kDim, a.q_head_stride = a.out_head_stride = kDim;
    a.mask_token_stride = n_kv, a.scale = 0.125f;
    return a;
}

/// [n_tokens][n_kv]: tokens at cells `first` and after see those up to their own.
inline std::vector<std::uint16_t> causal_mask(int first, int n_tokens, int n_kv) {
    std::vector<std::uint16_t> mask(static_cast<std::size_t>(n_tokens) * n_kv, kMaskHidden);
    for (int t = 0; t < n_tokens; t++) std::fill_n(mask.begin() + t * n_kv, first + t + 1, std::uint16_t{0});
    return mask;
}

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
        if (looks_later) {
            Queue& queue = Queue::of(ctx_.store, 0);
            queue.settle(), queue.end_graph(), queue.begin_graph();
            for (std::vector<float>* rows_of : {&k, &v}) std::ranges::fill(*rows_of, NAN);
        }
        // Else a GPU would have to move rows before it attends, and attend to the new ones in another way.
        const ExactRows *of_keys = layer.tensor(Side::key).exact(), *of_values = layer.tensor(Side::value).exact();
        EXPECT_TRUE(!of_keys || std::ranges::equal(of_keys->slots(), of_values->slots())) << "keys and values in different slots";
        const StreamQuery query{q.data(), out.data(), mask.data(), nullptr, mask.data()};
        const char* error = layer.attend(ctx_, call_of(static_cast<int>(rows.size()), n_kv), 0, {&query, 1});
        EXPECT_EQ(error, nullptr) << error;
    }

    /// What step() gave as a graph.
    struct Given {
        Launches launches;
        bool waited = true;       ///< to the last; else only the rest of them
        std::size_t n_early = 0;  ///< launches besides that may be done early
    };
    bool looks_later = false;  ///< attention is in another graph than the rows, whose memory is another's by then
    bool in_pieces = false;    ///< graph()s are two pieces, each of a layer; Given: of the last
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
        const auto catch_up = [&] { given.waited = false, give_all(queue.take()); };
        between_ = [&] {
            if (in_pieces) {
                queue.join();
                if (queue.deferring()) give_all(queue.take());
                done = given.n_early = 0;
                queue.defer(catch_up);
            }
            if (queue.deferring()) marks.push_back({queue.waiting().size(), queue.earlies().size()});
            queue.other_work();
        };
        queue.begin_graph();
        queue.defer(catch_up);
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

inline std::vector<float> gaussian(std::mt19937& rng, std::size_t n, float offset) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (std::size_t i = 0; i < n; i++) x[i] = normal(rng) + offset * static_cast<float>(std::sin(0.7 * static_cast<double>(i % 128)));
    return x;
}

inline double error_of(const std::vector<float>& x, const std::vector<float>& of) {
    double diff = 0, norm = 0;
    for (std::size_t i = 0; i < x.size(); i++) diff += std::pow(x[i] - of[i], 2), norm += std::pow(of[i], 2);
    return std::sqrt(diff / norm);
}

}  // namespace turboquant::test
