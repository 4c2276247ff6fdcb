// Residuals on top of codes: every level against codec/residual.h and the double-precision reference.
#include "turboquant/codec/residual.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "tests/kernels/support.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/kernels/panel.h"

namespace turboquant::test {
namespace {

class Residual : public testing::TestWithParam<SimdLevel> {};

/// y less the code of a slot, in the rotated space, of which row `row` is the residual; returns squared errors: of the code, and what is left.
std::pair<double, double> errors(const TileShape& shape, const std::uint8_t* tile, int slot, std::span<const float> x,
                                 const std::uint8_t* row) {
    std::vector<float> y(x.begin(), x.end()), code(x.size()), both;
    rotation_for(shape.head_dim).forward(y);
    tile_decode_rotated(shape, tile, slot, code);
    both = code;
    residual_add(row, both);
    double of_code = 0, left = 0;
    for (std::size_t i = 0; i < y.size(); ++i) of_code += std::pow(y[i] - code[i], 2), left += std::pow(y[i] - both[i], 2);
    return {of_code, left};
}

TEST_P(Residual, IsWhatTheCodeLeaves) {
    const Kernels& k = kernels(GetParam());
    constexpr int n = 70, first_cell = 30;  // in two tiles
    for (const CodecInfo& info : kCodecs) {
        if (!info.rotated) continue;
        for (const int d : kHeadDims)
            for (const Side side : {Side::key, Side::value}) {
                SCOPED_TRACE(testing::Message() << info.name << ' ' << d << (side == Side::key ? " key" : " value"));
                const TileShape shape{info.id, side, d};
                SplitMix64 random(d + info.bits);
                std::vector<float> x(static_cast<std::size_t>(n) * d), turns(2 * x.size()), mu(2 * static_cast<std::size_t>(d));
                for (float& f : x) f = 3 * static_cast<float>(random.normal());
                for (float& f : mu) f = static_cast<float>(random.normal());
                for (float& f : turns) f = static_cast<float>(random.normal());
                std::fill_n(x.begin() + static_cast<std::ptrdiff_t>(4) * d, d, 0.0f);
                x[static_cast<std::size_t>(5) * d + 1] = std::numeric_limits<float>::infinity();
                std::vector<std::uint8_t> tiles(2 * tile_bytes(shape) + 64), rows(n * residual_bytes(d), 0xaa);
                std::vector<std::int64_t> cells(n);
                std::iota(cells.begin(), cells.end(), first_cell);
                std::vector<std::uint8_t*> to(n);
                std::vector<const float*> offsets(n);
                for (int i = 0; i < n; ++i) to[i] = i % 7 == 3 ? nullptr : rows.data() + i * residual_bytes(d);
                for (int i = 0; i < n; ++i) offsets[i] = i % 3 ? mu.data() : nullptr;
                offsets[4] = nullptr;
                EncodeArgs a;
                a.shape = shape, a.tiles = tiles.data(), a.tile_stride = tile_bytes(shape), a.x = x.data(), a.x_stride = d;
                a.cells = cells.data(), a.n = n, a.turns = turns.data(), a.offsets = offsets.data();
                encode(k, a);
                encode_residuals(k, a, to.data());
                double of_code = 0, left = 0;
                for (int i = 0; i < n; ++i) {
                    const std::uint8_t* row = rows.data() + i * residual_bytes(d);
                    const std::uint8_t* tile = tiles.data() + cells[i] / kTileKeys * a.tile_stride;
                    const int slot = static_cast<int>(cells[i] % kTileKeys);
                    if (!to[i]) {
                        EXPECT_TRUE(std::all_of(row, row + residual_bytes(d), [](std::uint8_t b) { return b == 0xaa; })) << i;
                        continue;
                    }
                    if (i == 4 || i == 5) {
                        EXPECT_TRUE(std::all_of(row, row + residual_bytes(d), [](std::uint8_t b) { return b == 0; })) << i;
                        continue;
                    }
                    std::vector<float> y(x.begin() + static_cast<std::ptrdiff_t>(i) * d,
                                         x.begin() + static_cast<std::ptrdiff_t>(i + 1) * d);
                    for (int j = 0; offsets[i] && j < d; ++j)
                        y[j] -= mu[j] * turns[static_cast<std::size_t>(i) * 2 * d + j] +
                                mu[d + j] * turns[static_cast<std::size_t>(i) * 2 * d + d + j];
                    const auto [c, l] = errors(shape, tile, slot, y, row);
                    // The definition, of the same codes: not a bit of the codes need be the same, where a value is halfway between levels.
                    std::vector<float> rotated = y, code(d);
                    rotation_for(d).forward(rotated);
                    tile_decode_rotated(shape, tile, slot, code);
                    for (int j = 0; j < d; ++j) rotated[j] -= code[j];
                    std::vector<std::uint8_t> spec(residual_bytes(d));
                    residual_encode(rotated, spec.data());
                    const auto [c2, l2] = errors(shape, tile, slot, y, spec.data());
                    EXPECT_NEAR(l, l2, 0.02 * l2 + 1e-9) << i;
                    of_code += c, left += l;
                }
                EXPECT_LT(left, (info.bits < 6 ? 1 : 1.6) * (0.013 + 5e-5 * d) * of_code)
                    << "fine codes leave few large values, at their ends";
                EXPECT_GT(left, 0.004 * of_code);
            }
    }
}

struct ResidualCase {
    Case c;
    int n = 40;
};

const ResidualCase kResidualCases[] = {
    {{.k = CodecId::turbo8, .v = CodecId::turbo8, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_kv = 300}, 18},
    {{.k = CodecId::turbo8,
      .v = CodecId::turbo6,
      .k_dim = 80,
      .v_dim = 112,
      .n_head = 6,
      .n_head_kv = 2,
      .n_tokens = 9,
      .n_kv = 1000,
      .mask = Mask::causal,
      .sinks = true},
     70},
    {{.k = CodecId::turbo5,
      .v = CodecId::turbo8,
      .k_dim = 80,
      .v_dim = 96,
      .n_head = 3,
      .n_tokens = 30,
      .n_kv = 200,
      .mask = Mask::random,
      .mask_heads = 3,
      .softcap = 5},
     150},
    {{.k = CodecId::turbo8, .v = CodecId::turbo8, .n_head = 3, .n_tokens = 5, .n_kv = 200, .mask = Mask::causal, .max_bias = 8}, 90},
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
    {{.k = CodecId::turbo2,  // integers, whose panel is made of the keys'
      .v = CodecId::turbo2,
      .k_dim = 576,
      .v_dim = 576,
      .n_head = 8,
      .n_tokens = 3,
      .n_kv = 90,
      .mla_out = 512},
     80},
    {{.k = CodecId::tcq2, .v = CodecId::turbo3, .k_dim = 128, .v_dim = 128, .n_head = 7, .n_head_kv = 1, .n_kv = 300},
     70},  // few rows: 4 and 3
    {{.k = CodecId::tcq3, .v = CodecId::tcq3, .k_dim = 64, .v_dim = 64, .n_head = 14, .n_head_kv = 2, .n_kv = 300}, 70},
    {{.k = CodecId::tcq3, .v = CodecId::tcq3, .k_dim = 64, .v_dim = 64, .n_head = 9, .n_head_kv = 3, .n_kv = 130, .mask = Mask::causal},
     26},
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
    {{.k = CodecId::tcq2, .v = CodecId::turbo2, .k_dim = 64, .v_dim = 64, .n_head = 9, .n_head_kv = 3, .n_kv = 2048}, 2048},
};

/// Residuals of the size that codes of 2 bits leave, of ascending cells, in scattered slots, wanted by some rows of the call.
struct ResidualsOf {
    ResidualsOf(const ResidualCase& e, Problem& p) {
        SplitMix64 random(9);
        const Case& c = e.c;
        const std::size_t n = e.n, n_slots = n + 5, v_dim = c.mla_out ? c.k_dim : c.v_dim,
                          rows = static_cast<std::size_t>(c.n_tokens) * c.mask_heads;
        const auto fill = [&](std::vector<std::uint8_t>& to, std::size_t d) {
            to.resize(n_slots * c.n_head_kv * residual_bytes(static_cast<int>(d)));
            std::vector<float> left(d);
            for (std::size_t at = 0; at < to.size(); at += residual_bytes(static_cast<int>(d))) {
                for (float& f : left) f = 2 * static_cast<float>(random.normal());
                residual_encode(left, to.data() + at);
            }
        };
        fill(k, c.k_dim), fill(v, v_dim);
        slots = scattered_slots(random, n_slots);
        std::vector<std::int32_t> all(c.n_kv);
        std::iota(all.begin(), all.end(), 0);
        for (std::size_t i = 0; i < all.size(); ++i) std::swap(all[i], all[random.bits() % all.size()]);
        cells.assign(all.begin(), all.begin() + e.n);
        std::ranges::sort(cells);
        mask.assign(rows * n, 0);
        for (auto& m : mask) m = random.uniform() < 0.3 ? kMaskHidden : 0;
        ExactRowsView& x = p.args.exact;
        x.n = e.n, x.form = WindowForm::residual, x.cells = cells.data();
        // Keys lie slot by slot, values head by head.
        x.k = k.data(), x.k_stride = c.n_head_kv * residual_bytes(c.k_dim), x.k_slots = slots.data();
        x.k_head_stride = residual_bytes(c.k_dim);
        x.v = v.data(), x.v_stride = residual_bytes(static_cast<int>(v_dim)), x.v_slots = slots.data() + n_slots;
        x.v_head_stride = n_slots * x.v_stride;
        if (c.mla_out) x.v = x.k, x.v_stride = x.k_stride, x.v_head_stride = x.k_head_stride, x.v_slots = x.k_slots;
        x.mask = mask.data();
    }
    std::vector<std::uint8_t> k, v;
    std::vector<std::uint16_t> mask;
    std::vector<std::int32_t> slots, cells;
};

TEST_P(Residual, AttentionIsTheReferences) {
    for (const ResidualCase& e : kResidualCases) {
        SCOPED_TRACE(testing::PrintToString(e.c));
        Problem p(e.c);
        const std::vector<float> without = p.reference();
        const ResidualsOf rows(e, p);
        ASSERT_EQ(check_attention_args(p.args), nullptr);
        const std::vector<float> expected = p.reference();
        // Residuals are decoded to int8 levels, which is all that is lost where the codes are floats.
        const double left_out = relative_error(without, expected), most = panel_kind(e.c.k) == PanelKind::i8 ? 1e-3 : 5e-3 * left_out;
        EXPECT_GT(left_out, 10 * most) << "the test would not notice residuals that are left out";
        p.args.exact.mask = nullptr;
        EXPECT_GT(relative_error(p.reference(), expected), 10 * most) << "nor that rows do not want all";
        p.args.exact.mask = rows.mask.data();
        for (const int threads : {1, 7}) {
            const std::vector<float> got = kernel_in_parts(p, GetParam(), threads);
            EXPECT_LT(relative_error(got, expected), most) << threads;
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Levels, Residual, testing::ValuesIn(available_simd_levels().begin(), available_simd_levels().end()),
                         [](const auto& i) { return level_name(i.param); });

}  // namespace
}  // namespace turboquant::test
