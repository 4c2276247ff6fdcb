// Rows that are kept, by warps, without a GPU: butterflies against the product with the rotation.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "tests/cuda/rotation_signs.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/random.h"
#include "turboquant/cuda/impl/step.h"

namespace turboquant::cuda {
namespace {

// What keep_rows leaves, either way.
struct Kept {
    std::vector<float> out;
    std::vector<std::uint16_t> halves, tiles, aside;

    Kept(KeepRows a, int n_slots, bool by_warps) {
        const std::size_t n_embd = static_cast<std::size_t>(a.n_head) * a.head_dim;
        out.assign(a.n * n_embd, -1), halves.assign(n_slots * n_embd, 7), tiles.assign(64 * ((n_slots + 63) / 64) * n_embd, 7);
        aside.assign(6 * n_embd, 7), a.aside = aside.data();
        a.out = out.data(), a.halves = halves.data(), a.tiles = reinterpret_cast<std::uint8_t*>(tiles.data()), a.tile_stride = 128 * n_embd;
        for (int i = 0; i < a.n; ++i)
            for (int h = 0; h < a.n_head; ++h) by_warps ? warp(a, i, h) : values(a, i, h);
    }
    static void values(const KeepRows& a, int i, int h) {
        std::vector<float> kept(a.head_dim), with_signs(a.head_dim);
        for (int j = 0; j < a.head_dim; ++j) kept[j] = kept_value(a, i, h * a.head_dim + j), with_signs[j] = kept[j] * a.signs[j];
        for (int j = 0; j < a.head_dim; ++j) keep_value(a, i, h, j, kept.data(), with_signs.data());
    }
    static void warp(const KeepRows& a, int i, int h) {
        const auto of_size = [&]<int n>() {
            const std::function<void(int)> body = [&](int lane) { keep_head<n>(a, i, h, lane); };
            emulator::Block::run(32, body);
        };
        a.head_dim == 64 ? of_size.operator()<2>() : a.head_dim == 128 ? of_size.operator()<4>() : of_size.operator()<8>();
    }
};

TEST(KeepRowsEmulated, ButterfliesAreTheRotation) {
    for (const int d : {64, 128, 256})
        for (const bool keys : {true, false}) {
            constexpr int n = 5, n_head = 2;
            SplitMix64 random(d);
            std::vector<float> x(n * n_head * d);
            for (float& f : x) f = 3 * static_cast<float>(random.normal());
            const std::vector<float> signs = test::rotation_signs(d);
            const std::vector<std::int32_t> slots{3, -1, 70, 0, 65};
            const std::vector<std::int32_t> places{-1, 4, 0, 5, -1};
            const std::vector<std::uint8_t> rounded{1, 0, 1, 0, 1}, plain{0, 1};
            KeepRows a;
            a.x = x.data(), a.stride = static_cast<std::size_t>(n_head) * d, a.n = n, a.n_head = n_head, a.head_dim = d, a.keys = keys;
            a.rounded = rounded.data(), a.slots = slots.data(), a.signs = signs.data(), a.plain = plain.data();
            a.aside_places = places.data();
            const Kept expected(a, 71, false), got(a, 71, true);
            EXPECT_EQ(got.out, expected.out);
            EXPECT_EQ(got.halves, expected.halves);
            EXPECT_EQ(got.aside, expected.aside);
            for (int i = 0; i < n; ++i)
                for (int j = 0; places[i] >= 0 && j < n_head * d; ++j) {
                    const std::uint16_t half = to_half(x[i * n_head * d + j]);
                    ASSERT_EQ(got.aside[places[i] * n_head * d + j], keys && j < kTagged ? half & 0xfffe : half) << i << " " << j;
                }
            EXPECT_EQ(std::ranges::count(got.aside, 7), 3 * n_head * d);
            int written = 0;
            for (std::size_t i = 0; i < got.tiles.size(); ++i) {
                const float p = from_half(got.tiles[i]), q = from_half(expected.tiles[i]);
                ASSERT_NEAR(p, q, 2e-3 * std::max(1.f, std::abs(q))) << d << " " << i;
                written += expected.tiles[i] != 7;
            }
            EXPECT_NEAR(written, 4 * n_head * d, 8);
        }
}

}  // namespace
}  // namespace turboquant::cuda
