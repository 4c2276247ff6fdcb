// Rows that are kept by a step and attended to in the same step: beside the launch that keeps them, or where they were made.
#include "tests/cuda/attention_rig.h"

#ifdef TQ_HAS_CUDA
#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "tests/cuda/rotation_signs.h"
#include "turboquant/cuda/step.h"

namespace turboquant::cuda::test {
namespace {

using enum CodecId;
using turboquant::test::Case;
using turboquant::test::Problem;

class CudaKeeping : public Gpu {};

/// Memory of exact rows, which a rig's calls see.
struct ExactMemory {
    Rig& rig;
    int d, n_head_kv;
    const DeviceBytes *signs, *tiles[2], *halves[2];

    ExactMemory(Rig& of, int head_dim, int heads, int n_slots)
        : rig(of), d(head_dim), n_head_kv(heads), signs(of.keep(rotation_signs(head_dim))) {
        for (int side = 0; side < 2; ++side) {
            tiles[side] = rig.keep(std::vector<std::uint16_t>(static_cast<std::size_t>(n_slots) * n_embd()));
            halves[side] = rig.keep(std::vector<std::uint16_t>(static_cast<std::size_t>(n_slots) * n_embd()));
            Tiles t;
            t.tiles = tiles[side]->as<std::uint8_t>(), t.head_stride = 128 * d, t.tile_stride = 128 * n_embd(), t.codec = raw;
            (side ? rig.args.exact_v : rig.args.exact_k) = t;
        }
    }
    std::size_t n_embd() const { return static_cast<std::size_t>(n_head_kv) * d; }

    /// Keys and values of a batch. `keys`: others than the numbers' usual.
    std::array<KeepRows, 2> batch(const std::vector<std::int32_t>& slots, int number, const std::vector<float>& keys = {}) const {
        std::array<KeepRows, 2> of;
        const DeviceBytes* places = rig.keep(slots);
        for (int side = 0; side < 2; ++side) {
            std::vector<float> x(slots.size() * n_embd());
            for (std::size_t i = 0; i < x.size(); ++i) x[i] = 2 * std::sin(static_cast<float>((i * 37 + 11 * side + 101 * number) % 1009));
            if (side == 0 && !keys.empty()) x = keys;
            KeepRows& k = of[side];
            k.x = rig.keep(x)->as<float>(), k.stride = n_embd(), k.n = static_cast<int>(slots.size()), k.n_head = n_head_kv, k.head_dim = d;
            k.keys = side == 0, k.slots = places->as<std::int32_t>(), k.signs = k.matrix = signs->as<float>();
            k.halves = halves[side]->as<std::uint16_t>(), k.tiles = tiles[side]->as<std::uint8_t>(), k.tile_stride = 128 * n_embd();
        }
        return of;
    }
};

TEST_F(CudaKeeping, AttentionBesideReadsWhatIsKept) {
    constexpr int n_head_kv = 2, n_slots = 256;
    for (const CodecId id : {turbo4, tcq3, turbo8})
        for (const int d : {64, 128})
            for (const int n_kv : {64, 1000}) {
                SCOPED_TRACE(std::string(codec_info(id).name) + " " + std::to_string(d) + " " + std::to_string(n_kv));
                Case c{.k = id,
                       .v = id,
                       .k_dim = d,
                       .v_dim = d,
                       .n_head = 8,
                       .n_head_kv = n_head_kv,
                       .n_kv = n_kv,
                       .n_freq = d / 2,
                       .successive = true};
                c.random_codes = true, c.sharpness = 12, c.term_size = 3;
                Problem problem(c);
                const turboquant::AttentionArgs* one = &problem.args;
                Rig rig({one}, false, true);
                const ExactMemory memory(rig, d, n_head_kv, n_slots);
                const std::array<KeepRows, 2> keep[2] = {memory.batch({0, 70, 130, 200, 255}, 0), memory.batch({0, 70, 130, 200, 255}, 1)};
                rig.args.exact_n = rig.keep(std::vector<std::int32_t>{n_slots})->as<std::int32_t>();
                std::vector<float> expected[2];
                for (int batch = 0; batch < 2; ++batch)
                    expected[batch] = rig.run_after([&](Stream stream) {
                        must(keep_rows(keep[batch][0], stream, &keep[batch][1]));
                        must(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
                    });
                ASSERT_NE(expected[0], expected[1]);
                rig.args.beside_keeping = true;
                for (int i = 0; i < 40; ++i) {
                    const std::vector<float> out =
                        rig.run_after([&](Stream stream) { must(keep_rows(keep[i % 2][0], stream, &keep[i % 2][1])); });
                    ASSERT_EQ(out, expected[i % 2]) << i;
                }
            }
}

/// A key for each token of the calls, of which its first query of each KV head says 10: it must not go unseen among 1,000 others.
std::vector<float> like_queries(const std::vector<const turboquant::AttentionArgs*>& calls, int n_head_kv, int d) {
    std::vector<float> keys;
    for (const turboquant::AttentionArgs* a : calls)
        for (int t = 0; t < a->n_tokens; ++t)
            for (int h = 0; h < n_head_kv; ++h) {
                const float* q = a->q + (static_cast<std::size_t>(t) * a->n_head + h * (a->n_head / n_head_kv)) * d;
                const float norm = std::inner_product(q, q + d, q, 0.f);
                for (int i = 0; i < d; ++i) keys.push_back(10 / (a->scale * norm) * q[i]);
            }
    return keys;
}

struct Apart {
    int d, n_head, n_tokens, n_seq;
    bool sinks = false;
    float softcap = 0, max_bias = 0;
    CodecId codec = turbo4;
};
class CudaRowsApart : public CudaKeeping, public ::testing::WithParamInterface<Apart> {};

/// As rows that were kept before: the same but for the rounding of what is kept, and what is kept is the same.
TEST_P(CudaRowsApart, AreAttendedToAsKeptRowsAre) {
    constexpr int n_head_kv = 2, n_slots = 128, n_old = 10;
    constexpr std::uint16_t kMinusOne = 0xbc00;
    const Apart& a = GetParam();
    std::vector<std::unique_ptr<Problem>> problems;
    std::vector<const turboquant::AttentionArgs*> calls;
    for (int s = 0; s < a.n_seq; ++s) {
        Case c{.k = a.codec, .v = a.codec, .k_dim = a.d, .v_dim = a.d, .n_head = a.n_head, .n_head_kv = n_head_kv, .n_tokens = a.n_tokens};
        c.n_kv = s ? 130 : 1000, c.softcap = a.softcap, c.sinks = a.sinks, c.random_codes = true;
        problems.push_back(std::make_unique<Problem>(c, s + 1));
        calls.push_back(&problems.back()->args);
    }
    Rig rig(calls, false, true);
    const int n_new = a.n_seq * a.n_tokens;
    const ExactMemory memory(rig, a.d, n_head_kv, n_slots);
    std::vector<std::int32_t> old_slots, new_slots;
    for (int i = 0; i < n_old; ++i) old_slots.push_back(3 * i);
    for (int i = 0; i < n_new; ++i) new_slots.push_back(40 + 5 * i);
    const std::array<KeepRows, 2> before = memory.batch(old_slots, 0),
                                  made = memory.batch(new_slots, 1, like_queries(calls, n_head_kv, a.d));
    must(keep_rows(before[0], nullptr, &before[1]));
    must(cudaDeviceSynchronize());

    // A token sees its sequence's old rows, shared here, and the new ones up to its own.
    const std::uint16_t near = a.max_bias > 0 ? kMinusOne : std::uint16_t{0};
    std::vector<std::uint16_t> all(static_cast<std::size_t>(n_new) * n_slots, kMaskHidden), old, fresh;
    for (int row = 0; row < n_new; ++row)
        for (const int slot : old_slots) all[row * n_slots + slot] = near;
    for (int row = 0; row < n_new; ++row)
        for (int i = 0; i < n_new; ++i) {
            const bool seen = i / a.n_tokens == row / a.n_tokens && i <= row;
            fresh.push_back(seen ? (i < row ? near : std::uint16_t{0}) : kMaskHidden);
            all[row * n_slots + new_slots[i]] = fresh.back();
        }
    old = all;
    for (int row = 0; row < n_new; ++row)
        for (const int slot : new_slots) old[row * n_slots + slot] = kMaskHidden;
    if (a.max_bias > 0) {  // of a mask
        rig.args.max_bias = a.max_bias;
        rig.args.mask = rig.keep(std::vector<std::uint16_t>(static_cast<std::size_t>(n_new) * 1024, kMinusOne))->as<std::uint16_t>();
        rig.args.mask_token_stride = 1024, rig.args.mask_seq_stride = 1024 * a.n_tokens;
    }
    rig.args.exact_n = rig.keep(std::vector<std::int32_t>(a.n_seq, n_slots))->as<std::int32_t>();
    rig.args.exact_mask = rig.keep(all)->as<std::uint16_t>();
    rig.args.exact_mask_token_stride = n_slots, rig.args.exact_mask_seq_stride = static_cast<std::size_t>(a.n_tokens) * n_slots;
    const auto* old_mask = rig.keep(old)->as<std::uint16_t>();
    const NewRows rows{made[0], made[1], rig.keep(fresh)->as<std::uint16_t>()};
    ASSERT_TRUE(can_split(rig.plan, rig.args, rows.keys, rows.values));
    const std::vector<float> split = rig.run_split(rows, old_mask), kept = rig.run();
    for (const float x : split) ASSERT_TRUE(std::isfinite(x));
    EXPECT_LT(error_of(split, kept), 1e-3);
    const NewRows unseen{made[0], made[1], rig.keep(std::vector<std::uint16_t>(fresh.size(), kMaskHidden))->as<std::uint16_t>()};
    EXPECT_GT(error_of(rig.run_split(unseen, old_mask), kept), 1e-2);
    const std::vector<float> again = rig.run_after([&](Stream stream) { must(keep_rows(made[0], stream, &made[1])); });
    EXPECT_EQ(kept, again);  // the split call had kept the same
}

INSTANTIATE_TEST_SUITE_P(Calls, CudaRowsApart,
                         ::testing::Values(Apart{128, 8, 1, 1}, Apart{64, 14, 1, 1}, Apart{128, 16, 1, 1, true},
                                           Apart{128, 8, 3, 1, true, 20}, Apart{64, 8, 8, 1}, Apart{128, 8, 16, 1}, Apart{128, 8, 1, 5},
                                           Apart{128, 8, 2, 3, true, 0, 8}, Apart{128, 8, 1, 1, false, 0, 8}, Apart{256, 8, 2, 1, true},
                                           Apart{512, 4, 1, 2}, Apart{128, 8, 2, 1, false, 30, 0, tcq3}));

}  // namespace
}  // namespace turboquant::cuda::test
#endif
