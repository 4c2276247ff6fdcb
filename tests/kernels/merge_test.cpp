// The log-sum-exp that attention returns, and results over disjoint cells merged by it.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "tests/kernels/support.h"
#include "turboquant/kernels/panel.h"

namespace turboquant::test {
namespace {

const Case kCases[] = {
    {.k_dim = 128, .v_dim = 128, .n_head = 4, .n_head_kv = 2, .n_tokens = 1, .n_kv = 1000},
    {.k = CodecId::turbo8, .v = CodecId::turbo3, .n_head = 4, .n_tokens = 9, .n_kv = 300, .mask = Mask::causal, .sinks = true},
    {.k = CodecId::raw, .v = CodecId::raw, .n_head = 4, .n_tokens = 5, .n_kv = 200, .mask = Mask::random, .mask_heads = 2, .softcap = 5},
    {.k = CodecId::raw, .v = CodecId::raw, .n_head = 3, .n_tokens = 5, .n_kv = 200, .mask = Mask::causal, .max_bias = 8},
    {.n_tokens = 6, .n_kv = 100, .mask = Mask::some_rows_empty},
    {.k = CodecId::turbo4, .v = CodecId::turbo4, .k_dim = 64, .v_dim = 64, .n_head = 8, .n_tokens = 3, .n_kv = 300, .mla_out = 48},
};

double largest_norm(const std::vector<float>& x, std::size_t dim) {
    double most = 0;
    for (std::size_t i = 0; i < x.size(); i += dim) most = std::max(most, std::inner_product(&x[i], &x[i] + dim, &x[i], 0.0));
    return std::sqrt(most);
}

class Merge : public testing::TestWithParam<SimdLevel> {};

TEST_P(Merge, LogSumExpIsTheReferences) {
    for (const Case& c : kCases) {
        SCOPED_TRACE(testing::PrintToString(c));
        Problem p(c);
        std::vector<float> reference(static_cast<std::size_t>(c.n_tokens) * c.n_head, 7), lse = reference;
        p.args.lse = reference.data();
        p.reference();
        p.args.lse = lse.data();
        kernel(p, GetParam());
        // An int8 query has steps of max|q|/127, about .025 for normal values: a logit errs by .025/sqrt(12) |k| scale; four times that.
        const double bound = c.k == CodecId::raw ? 2e-5 : 0.03 * largest_norm(p.keys, c.k_dim) * p.args.scale;
        double sum = 0;
        for (std::size_t i = 0; i < lse.size(); i++) {
            if (reference[i] == -std::numeric_limits<float>::infinity()) {
                EXPECT_EQ(lse[i], reference[i]) << i;
            } else {
                EXPECT_NEAR(lse[i], reference[i], bound) << i;
                sum += std::abs(lse[i] - reference[i]);
            }
        }
        EXPECT_LT(sum, bound / 2 * static_cast<double>(lse.size())) << "the errors are noise, not an offset";
    }
}

// Cells dealt out at random to two calls; the sink takes part in one.
TEST_P(Merge, TwoPartsAreTheWhole) {
    for (const Case& c : kCases) {
        SCOPED_TRACE(testing::PrintToString(c));
        Problem p(c);
        const std::vector<float> whole = kernel(p, GetParam());
        const std::size_t rows = static_cast<std::size_t>(c.n_tokens) * c.mask_heads, n_kv = c.n_kv;
        std::vector<std::uint16_t> masks[2] = {p.mask, p.mask};
        SplitMix64 random(5);
        for (auto& m : masks) m.resize(rows * n_kv);
        for (std::size_t j = 0; j < n_kv; j++) {
            auto& hidden = masks[random.uniform() < 0.3];
            for (std::size_t r = 0; r < rows; r++) hidden[r * n_kv + j] = kMaskHidden;
        }
        std::vector<float> lse[2], out(p.out.size());
        AttentionArgs part[2] = {p.args, p.args};
        for (int i = 0; i < 2; i++) {
            lse[i].resize(static_cast<std::size_t>(c.n_tokens) * c.n_head);
            part[i].lse = lse[i].data();
            part[i].mask = masks[i].data(), part[i].mask_heads = c.mask_heads;
            part[i].mask_head_stride = n_kv, part[i].mask_token_stride = n_kv * c.mask_heads;
        }
        part[1].sinks = nullptr, part[1].out = out.data();
        std::fill(p.out.begin(), p.out.end(), std::nanf(""));
        for (const AttentionArgs& a : part) attention(kernels(GetParam()), a);
        const std::vector<float> first = p.out;
        const int n_rows = c.n_tokens * c.n_head;
        merge_results(part[0], part[1], 0, n_rows / 2);
        merge_results(part[0], part[1], n_rows / 2, n_rows);
        const bool int8 = panel_kind(c.v) == PanelKind::i8;  // weights are rounded relative to the largest of their call
        EXPECT_LT(relative_error(p.out, whole), int8 ? 1e-4 : 1e-10);
        EXPECT_GT(relative_error(first, whole), 1e-3) << "one part alone is not the whole";
    }
}

INSTANTIATE_TEST_SUITE_P(Levels, Merge, testing::ValuesIn(available_simd_levels().begin(), available_simd_levels().end()),
                         [](const auto& i) { return std::string(simd_level_name(i.param)); });

}  // namespace
}  // namespace turboquant::test
