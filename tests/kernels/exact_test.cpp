// Exact rows beside the tiles, and patched masks: every level against the double-precision reference.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/kernels/support.h"
#include "turboquant/kernels/panel.h"

namespace turboquant::test {
namespace {

struct ExactCase {
    Case c;
    int n_exact = 40;
};

const ExactCase kCases[] = {
    {{.k = CodecId::turbo8, .v = CodecId::turbo8, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_kv = 300}, 18},
    {{.k = CodecId::raw,
      .v = CodecId::turbo8,
      .n_head = 4,
      .n_head_kv = 2,
      .n_tokens = 9,
      .n_kv = 1000,
      .mask = Mask::causal,
      .sinks = true},
     70},
    {{.k = CodecId::turbo8,
      .v = CodecId::raw,
      .k_dim = 80,
      .v_dim = 96,
      .n_head = 3,
      .n_tokens = 30,
      .n_kv = 200,
      .mask = Mask::random,
      .mask_heads = 3,
      .softcap = 5},
     150},
    {{.k = CodecId::raw, .v = CodecId::raw, .n_head = 3, .n_tokens = 5, .n_kv = 200, .mask = Mask::causal, .max_bias = 8}, 1},
    {{.k = CodecId::turbo8, .v = CodecId::turbo8, .n_tokens = 6, .n_kv = 100, .mask = Mask::some_rows_empty}, 65},
    {{.k = CodecId::turbo8,
      .v = CodecId::turbo8,
      .k_dim = 576,
      .v_dim = 576,
      .n_head = 8,
      .n_tokens = 3,
      .n_kv = 300,
      .n_freq = 32,
      .mla_out = 512},
     20},
    {{.k = CodecId::turbo4,
      .v = CodecId::tcq3,
      .k_dim = 128,
      .v_dim = 128,
      .n_head = 8,
      .n_head_kv = 2,
      .n_tokens = 40,
      .n_kv = 500,
      .mask = Mask::causal,
      .n_freq = 64,
      .successive = true},
     64},
};

/// Exact rows in scattered slots, seen by some rows of the call, and two patched tiles.
struct ExactRowsOf {
    ExactRowsOf(const ExactCase& e, Problem& p) {
        SplitMix64 random(9);
        const Case& c = e.c;
        const std::size_t n = e.n_exact, n_slots = n + 5, k_row = static_cast<std::size_t>(c.n_head_kv) * c.k_dim,
                          v_row = c.mla_out ? k_row : static_cast<std::size_t>(c.n_head_kv) * c.v_dim,
                          rows = static_cast<std::size_t>(c.n_tokens) * c.mask_heads;
        const auto fill = [&](std::vector<std::uint16_t>& x, std::size_t size) {
            x.resize(size);
            for (auto& h : x) h = to_half(static_cast<float>(random.normal()));
        };
        fill(k, n_slots * k_row), fill(v, n_slots * v_row);
        slots = scattered_slots(random, n_slots);
        q = p.q;
        for (float& x : q) x *= 1.1f;  // other queries than the tiles'
        mask.assign(rows * n, 0);
        for (auto& m : mask)
            m = random.uniform() < 0.3 ? kMaskHidden : c.mask == Mask::random ? to_half(static_cast<float>(random.normal())) : 0;
        if (c.mask == Mask::some_rows_empty) std::fill_n(mask.begin(), n, kMaskHidden);
        tile_patch.assign((c.n_kv + kTileKeys - 1) / kTileKeys, -1);
        tile_patch.front() = 1, tile_patch.back() = 0;
        patches.assign(2 * rows * kTileKeys, kMaskHidden);
        for (int patch = 0; patch < 2; ++patch)
            for (std::size_t r = 0; r < rows; ++r)
                for (int j = 0; j < kTileKeys; ++j) {
                    const std::size_t cell = patch ? j : (tile_patch.size() - 1) * kTileKeys + j;
                    if (cell >= static_cast<std::size_t>(c.n_kv) || random.uniform() < 0.5) continue;
                    patches[(patch * rows + r) * kTileKeys + j] = p.mask.empty() ? 0 : p.mask[r * c.n_kv + cell];
                }
        ExactRowsView& x = p.args.exact;
        x.n = e.n_exact;
        x.k = reinterpret_cast<const std::uint8_t*>(k.data()), x.k_stride = 2 * k_row, x.k_slots = slots.data();
        x.v = reinterpret_cast<const std::uint8_t*>(v.data()), x.v_stride = 2 * v_row, x.v_slots = slots.data() + n_slots;
        if (c.mla_out) x.v = x.k, x.v_slots = x.k_slots;
        x.q = q.data(), x.q_token_stride = p.args.q_token_stride, x.q_head_stride = p.args.q_head_stride;
        x.mask = mask.data();
        p.args.patch = {tile_patch.data(), patches.data()};
    }
    std::vector<std::uint16_t> k, v, mask, patches;
    std::vector<std::int32_t> slots;
    std::vector<std::int16_t> tile_patch;
    std::vector<float> q;
};

class Exact : public testing::TestWithParam<SimdLevel> {};

TEST_P(Exact, IsTheReferences) {
    for (const ExactCase& e : kCases) {
        SCOPED_TRACE(testing::PrintToString(e.c));
        Problem p(e.c);
        const std::vector<float> without = p.reference();
        const ExactRowsOf rows(e, p);
        ASSERT_EQ(check_attention_args(p.args), nullptr);
        std::vector<float> lse(static_cast<std::size_t>(e.c.n_tokens) * e.c.n_head), got_lse = lse;
        p.args.lse = lse.data();
        const std::vector<float> expected = p.reference();
        EXPECT_GT(relative_error(without, expected), 0.01) << "the test would not notice exact rows that are left out";
        const bool int8 = panel_kind(e.c.k) == PanelKind::i8;
        p.args.lse = got_lse.data();
        for (const int threads : {1, 7}) {  // with chunks, and without
            const std::vector<float> got = kernel_in_parts(p, GetParam(), threads);
            EXPECT_LT(relative_error(got, expected), int8 ? 1e-3 : 1e-9) << threads;
            double off = 0;
            for (std::size_t i = 0; i < lse.size(); ++i)
                if (std::isfinite(lse[i])) {
                    EXPECT_NEAR(got_lse[i], lse[i], int8 ? 0.5 : 1e-4) << i;
                    off += std::abs(got_lse[i] - lse[i]);
                } else {
                    EXPECT_EQ(got_lse[i], lse[i]) << i;
                }
            EXPECT_LT(off, (int8 ? 0.1 : 2e-5) * static_cast<double>(lse.size())) << "int8 queries err at random";
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Levels, Exact, testing::ValuesIn(available_simd_levels().begin(), available_simd_levels().end()),
                         [](const auto& i) { return level_name(i.param); });

}  // namespace
}  // namespace turboquant::test
