// Attention through a layer's cache, over every store: prompts and single tokens, offsets, scales, exact windows, two streams, a shared
// unified stream. The store by the scalar specification is the
// measure of the others; the CPU's has int8 levels.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
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
    Layer(StoreKind kind, const Case& c) : cells_(kCells, 1), layer_(cells_) {
        cells_.limit_offsets(4);
        for (const Side side : {Side::key, Side::value}) {
            KvGeometry g{side, side == Side::key ? c.k : c.v, default_norm_mode(side), kDim * kHeadsKv, kCells, 1};
            g.windows = c.windows;
            auto& memory = memory_.emplace_back(reserved_bytes(g) + 64);
            auto* at = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
            StoreFactory store = cpu_store_in(at);
            if (kind == StoreKind::spec) store = [](const Layout& layout) { return std::make_unique<SpecStore>(layout); };
            if (kind == StoreKind::cuda) store = cuda_store_in(at, 0);
            layer_.set_tensor(g, std::move(store));
        }
        LayerCache::KeyTreatment keys{c.offset, {}};
        std::string letters;
        letters.resize(c.scales ? kDim * kHeadsKv : 0);
        // Split pairs: a pair has one scale.
        for (int i = 0; c.scales && i < kDim * kHeadsKv; i++) letters[i] = static_cast<char>('K' + i % (kDim / 2) % 5);
        keys.scales = letters;
        layer_.bind(Side::key, kDim, keys);
        layer_.bind(Side::value, kDim, keys);
        RopeParams rope;
        rope.n_dims = kDim, rope.pairs = RopePairs::split;
        layer_.set_rope(rope);
        ctx_.store.executor = &executor_;
    }

    /// Tokens at cells first.., positions pos[i]; attention of all of them by `mask` ([tokens][n_kv]).
    std::vector<float> step(int first, const std::vector<std::int32_t>& pos, std::vector<float> k, std::vector<float> v,
                            const std::vector<float>& q, const std::vector<std::uint16_t>& mask, int n_kv) {
        const auto n = pos.size();
        std::vector<std::int64_t> rows(n);
        for (std::size_t i = 0; i < n; i++) rows[i] = first + static_cast<std::int64_t>(i);
        ctx_.plans.begin_graph();
        EXPECT_TRUE(layer_.write_keys(ctx_, {k.data(), kDim * kHeadsKv, rows, {}, {}}, pos));
        EXPECT_TRUE(layer_.write_values(ctx_, {v.data(), kDim * kHeadsKv, rows, {}, {}}));
        // Else a GPU would have to move rows before it attends, and attend to the new ones in another way.
        const ExactRows *of_keys = layer_.tensor(Side::key).exact(), *of_values = layer_.tensor(Side::value).exact();
        EXPECT_TRUE(!of_keys || std::ranges::equal(of_keys->slots(), of_values->slots())) << "keys and values in different slots";
        std::vector<float> out(n * kHeads * kDim, NAN);
        AttentionArgs a;
        a.n_head = kHeads, a.n_head_kv = kHeadsKv, a.n_tokens = static_cast<int>(n), a.n_kv = n_kv, a.v_dim_out = kDim;
        a.q_token_stride = a.out_token_stride = kHeads * kDim, a.q_head_stride = a.out_head_stride = kDim;
        a.mask_token_stride = n_kv, a.scale = 0.125f;
        const StreamQuery query{q.data(), out.data(), mask.data(), nullptr, mask.data()};
        const char* error = layer_.attend(ctx_, a, 0, {&query, 1});
        EXPECT_EQ(error, nullptr) << error;
        return out;
    }

    /// Takes over the first n cells of another, as llama.cpp saves and restores them.
    void restore_from(Layer& other, int n) {
        for (const Side side : {Side::key, Side::value}) {
            std::vector<std::uint8_t> rows(sizeof(std::uint16_t) * kDim * kHeadsKv * n);
            other.layer_.save(other.ctx_.store, side, 0, rows.size(), rows.data());
            EXPECT_EQ(layer_.restore(ctx_.store, side, 0, rows.size(), rows.data()), RestoreResult::ok);
        }
    }

  private:
    CellPositions cells_;
    LayerCache layer_;
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
