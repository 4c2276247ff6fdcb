// One conformance grid for every level: what the kernels compute against the double-precision reference on the same tiles.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <thread>

#include "tests/kernels/grid.h"
#include "turboquant/kernels/panel.h"

namespace turboquant::test {
namespace {

using enum CodecId;

// What int8 arithmetic may cost, as a share of the quantization error: the finer the format, the more. tcq5 stays a third below turbo5.
double int8_share(const Case& c, double share) { return c.k == tcq5 || c.v == tcq5 ? 4 * share : share; }

bool int8_panels(const Case& c) { return !c.k_heads.empty() || panel_kind(c.k) == PanelKind::i8 || panel_kind(c.v) == PanelKind::i8; }

class Conformance : public testing::TestWithParam<SimdLevel> {};

// Float panels: rounding of float arithmetic. Int8 panels: a small share of what quantization itself costs on the same data.
TEST_P(Conformance, Grid) {
    double worst_share = 0, worst_float = 0;
    for (const Case& c : attention_grid()) {
        SCOPED_TRACE(testing::PrintToString(c));
        Problem p(c);
        const std::vector<float> reference = p.reference(), out = kernel(p, GetParam());
        const double error = relative_error(out, reference);
        if (!int8_panels(c)) {
            worst_float = std::max(worst_float, error);
            EXPECT_LT(error, 1e-10);
            continue;
        }
        Case exact = c;
        exact.k = exact.v = raw, exact.k_heads.clear(), exact.v_heads.clear();
        const double quantization = relative_error(reference, Problem(exact).reference());
        const bool one_value = c.n_kv == 1 || (c.mask == Mask::causal && c.n_kv == 2);  // then no weight is quantized
        EXPECT_GT(quantization, 1e-4);
        EXPECT_LT(quantization, c.k == tcq1 ? 10 : 1);
        EXPECT_LT(error, int8_share(c, 0.04) * quantization) << "quantization " << quantization;
        const bool exact_levels = codec_info(c.v).family == Family::trellis;  // then a row that sees one key only is exact
        if (!one_value && !exact_levels) {
            EXPECT_GT(error, 1e-8) << "the int8 path did not run?";
        }
        worst_share = std::max(worst_share, error / quantization);
    }
    RecordProperty("worst_share_of_quantization_error", std::to_string(worst_share));
    RecordProperty("worst_float_error", std::to_string(worst_float));
    std::cout << "largest error: " << worst_share << " of the quantization's (int8), " << worst_float << " (float)\n";
}

// Bounds of the other kind: over long rows the int8 arithmetic costs less than 2 % of the quantization error.
TEST_P(Conformance, Int8CostsLittle) {
    for (const CodecId id : {turbo4, turbo3, turbo2, tcq5, tcq4, tcq3, tcq2, tcq1}) {
        Case c{.k = id, .v = id, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_tokens = 4, .n_kv = 1500};
        Case exact = c;
        exact.k = exact.v = raw;
        Problem p(c);
        const std::vector<float> reference = p.reference();
        const double share = relative_error(kernel(p, GetParam()), reference) / relative_error(reference, Problem(exact).reference());
        EXPECT_LT(share, int8_share(c, 0.02)) << codec_info(id).name;
        EXPECT_GT(share, 1e-5) << codec_info(id).name;
    }
}

// A head's output is what it is without the others.
TEST_P(Conformance, FormatsPerHeadDoNotTouchEachOther) {
    const Case c{.k_dim = 128,
                 .v_dim = 128,
                 .n_head = 6,
                 .n_head_kv = 3,
                 .n_tokens = 5,
                 .n_kv = 700,
                 .mask = Mask::causal,
                 .k_heads = {turbo8, tcq2, turbo4},
                 .v_heads = {tcq5, turbo6, turbo3}};
    Problem p(c);
    const std::vector<float> all = kernel(p, GetParam());
    for (int h = 0; h < 3; ++h) {
        AttentionArgs one = p.args;
        const auto alone = [h](const TileView& v) { return TileView{v.head_shape(h), v.head_tiles(h), 0, v.tile_stride, nullptr}; };
        one.k = alone(one.k), one.v = alone(one.v);
        one.n_head = 2, one.n_head_kv = 1;
        one.q += 2 * h * one.q_head_stride, one.out += 2 * h * one.out_head_stride;
        attention(kernels(GetParam()), one);
    }
    EXPECT_EQ(p.out, all);
    p.k_heads[1].codec = raw;
    EXPECT_NE(check_attention_args(p.args), nullptr) << "a format that cannot stand beside others";
}

TEST_P(Conformance, MaskedRowsAreZero) {
    Problem p({.n_head = 4, .n_tokens = 6, .n_kv = 100, .mask = Mask::some_rows_empty, .sinks = true});
    const std::vector<float> out = kernel(p, GetParam());
    for (int t = 0; t < 6; ++t) {
        double energy = 0;
        for (int i = 0; i < 4 * 64; ++i) energy += std::abs(out[t * 256 + i]);
        EXPECT_EQ(energy == 0, t % 2 == 0) << t;
    }
}

// What a masked cell holds must not matter, however large.
TEST_P(Conformance, MaskedCellsDoNotLeak) {
    Problem p({.n_head = 4, .n_tokens = 2, .n_kv = 200, .mask = Mask::causal});
    const std::vector<float> before = kernel(p, GetParam());
    const std::vector<float> huge(64, 3e4f);
    tile_encode(p.args.k.shape, p.k_tiles.data() + 3 * p.args.k.tile_stride, 50, huge);  // cell 242, past n_kv
    tile_encode(p.args.v.shape, p.v_tiles.data() + 3 * p.args.v.tile_stride, 50, huge);
    EXPECT_EQ(kernel(p, GetParam()), before);
    tile_encode(p.args.k.shape, p.k_tiles.data() + 3 * p.args.k.tile_stride, 7, huge);  // cell 199: visible to the last token only
    const std::vector<float> after = kernel(p, GetParam());
    EXPECT_TRUE(std::equal(after.begin(), after.begin() + 256, before.begin()));
    EXPECT_GT(relative_error(after, before), 1e-3);
}

// The same tokens one at a time and in one call.
TEST_P(Conformance, DecodeEqualsPrefill) {
    for (const CodecId id : {turbo4, turbo3, turbo8}) {
        const Case c{
            .k = id, .v = id, .k_dim = 128, .v_dim = 128, .n_head = 6, .n_head_kv = 2, .n_tokens = 50, .n_kv = 400, .mask = Mask::causal};
        Problem p(c);
        const std::vector<float> batch = kernel(p, GetParam());
        std::fill(p.out.begin(), p.out.end(), 0);
        for (int t = 0; t < c.n_tokens; ++t) {
            AttentionArgs one = p.args;
            one.n_tokens = 1;
            one.q += t * one.q_token_stride, one.out += t * one.out_token_stride, one.mask += t * one.mask_token_stride;
            attention(kernels(GetParam()), one);
        }
        EXPECT_LT(relative_error(p.out, batch), 1e-11);
    }
}

// Any number of threads, in any order, gives the same result up to float rounding; the same number gives the same bits.
TEST_P(Conformance, Threads) {
    const Kernels& k = kernels(GetParam());
    for (const int tokens : {1, 40}) {
        Problem p({.k = turbo4,
                   .v = turbo3,
                   .n_head = 12,
                   .n_head_kv = 3,
                   .n_tokens = tokens,
                   .n_kv = 1900,
                   .mask = Mask::causal,
                   .sinks = true});
        const std::vector<float> single = kernel(p, GetParam());
        for (const int n_threads : {2, 3, 5, 8, 16}) {
            const AttentionPlan plan = plan_attention(p.args, n_threads);
            EXPECT_EQ(plan.n_threads, n_threads);
            EXPECT_GE(3 * plan.n_row_blocks * plan.n_chunks * 10, n_threads * 9);
            AlignedBytes workspace(plan.workspace_bytes);
            const auto run_parallel = [&](const AttentionArgs& a) {
                for (const auto part : {run_attention, merge_attention}) {
                    std::vector<std::jthread> team;
                    for (int i = 0; i < n_threads; ++i) team.emplace_back([&, i] { part(k, plan, a, workspace.data(), i); });
                }
            };
            const auto run_backwards = [&](const AttentionArgs& a) {
                for (const auto part : {run_attention, merge_attention})
                    for (int i = n_threads; i-- > 0;) part(k, plan, a, workspace.data(), i);
            };
            const std::vector<float> parallel = p.run(run_parallel);
            EXPECT_LT(relative_error(parallel, single), 1e-11);
            EXPECT_EQ(parallel, p.run(run_backwards));
            for (std::size_t i = plan.workspace_bytes; i < plan.workspace_bytes + 64; ++i)
                EXPECT_EQ(workspace.data()[i], 0xff) << "beyond the workspace";
        }
    }
}

TEST_P(Conformance, PlanOfNothing) {
    Problem p({.n_kv = 1});
    p.args.n_tokens = 0;
    attention(kernels(GetParam()), p.args);
    p.args.n_tokens = 1, p.args.n_kv = 0;
    const std::vector<float> out = kernel(p, GetParam());
    EXPECT_EQ(std::count(out.begin(), out.end(), 0.0f), static_cast<std::ptrdiff_t>(out.size()));
}

std::vector<SimdLevel> levels() { return {available_simd_levels().begin(), available_simd_levels().end()}; }
INSTANTIATE_TEST_SUITE_P(Levels, Conformance, testing::ValuesIn(levels()), [](const auto& i) { return level_name(i.param); });

}  // namespace
}  // namespace turboquant::test
