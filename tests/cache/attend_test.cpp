// Attention through a layer's cache, over every store: prompts and single tokens, offsets, scales, exact windows, two streams, a shared
// unified stream. The store by the scalar specification is the measure of the others; the CPU's has int8 levels.
#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <vector>

#include "tests/cache/layer_rig.h"

namespace turboquant {
namespace {

using namespace turboquant::test;

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
            std::vector<std::int32_t> pos(n);
            std::iota(pos.begin(), pos.end(), 0);
            one.step(0, pos, values(n, kHeadsKv, 2), values(n, kHeadsKv, 0), values(n, kHeads, 0), causal_mask(0, n, 64), 64);
            two.restore_from(one, n);
            for (int i = n; i < n + 3; i++) {
                const auto k = values(1, kHeadsKv, 2), v = values(1, kHeadsKv, 0), q = values(1, kHeads, 0);
                EXPECT_EQ(two.step(i, {i}, k, v, q, causal_mask(i, 1, 64), 64), one.step(i, {i}, k, v, q, causal_mask(i, 1, 64), 64)) << i;
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
