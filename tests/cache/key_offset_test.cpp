#include "turboquant/cache/key_offset.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>

#include "turboquant/cache/kv_tensor.h"

using namespace turboquant;

namespace {

constexpr int kHeads = 2, kDim = 64, kEmbd = kHeads * kDim;

RopeParams rope() {
    RopeParams p;
    p.n_dims = kDim;
    return p;
}

/// Keys with a constant part `bias` before RoPE, at positions pos[i].
std::vector<float> biased_keys(const std::vector<std::int32_t>& pos, const std::vector<float>& bias, unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(pos.size() * kEmbd), table(kDim);
    for (std::size_t i = 0; i < pos.size(); i++) {
        for (int j = 0; j < kEmbd; j++) x[i * kEmbd + j] = bias[j] + normal(rng);
        rope_table(rope(), static_cast<float>(pos[i]), table);
        for (int h = 0; h < kHeads; h++) rope_apply(rope(), table, std::span(x).subspan(i * kEmbd + h * kDim, kDim));
    }
    return x;
}

std::vector<float> some_bias() {
    std::vector<float> b(kEmbd);
    for (int i = 0; i < kEmbd; i++) b[i] = i % 7 == 0 ? 20.0f : 0.5f * std::sin(static_cast<float>(i));
    return b;
}

std::vector<std::int32_t> iota32(int n, int first = 0) {
    std::vector<std::int32_t> v(n);
    std::iota(v.begin(), v.end(), first);
    return v;
}
std::vector<std::int64_t> iota64(int n, int first = 0) {
    std::vector<std::int64_t> v(n);
    std::iota(v.begin(), v.end(), first);
    return v;
}

struct Cache {
    explicit Cache(CodecId codec, bool offset = true) : g{Side::key, codec, NormMode::corrected, kEmbd, 512, 2} {
        memory.resize(KvTensor::reserved_bytes(g) + 64);
        auto* aligned = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
        kv = std::make_unique<KvTensor>(g, aligned);
        kv->bind_head_dim(kDim);
        if (offset) kv->enable_offset(), kv->offset()->set_rope(rope());
    }
    KvTensor::Geometry g;
    std::vector<std::uint8_t> memory;
    std::unique_ptr<KvTensor> kv;
};

/// Relative squared error of what the cache holds against the keys written.
double stored_error(const KvTensor& kv, const std::vector<float>& x, const std::vector<std::int64_t>& rows,
                    const std::vector<std::int32_t>& pos) {
    std::vector<float> out(kEmbd);
    double error = 0;
    for (std::size_t i = 0; i < rows.size(); i++) {
        kv.read_row(rows[i], pos[i], out);
        for (int j = 0; j < kEmbd; j++) error += std::pow(out[j] - x[i * kEmbd + j], 2);
    }
    return error / static_cast<double>(rows.size() * kEmbd);
}

}  // namespace

TEST(KeyOffset, FindsTheConstantPartBeforeRope) {
    const auto bias = some_bias();
    KeyOffset offset(kHeads, kDim);
    offset.set_rope(rope());
    const auto pos = iota32(300, 1000);
    const auto x = biased_keys(pos, bias, 1);
    FirstRows rows;
    rows.add(x.data(), kEmbd, kEmbd, iota64(300), pos, false);
    EXPECT_TRUE(rows.enough());
    EXPECT_EQ(rows.rows().size(), FirstRows::kMeasureRows);
    offset.measure(rows.rows());
    double error = 0;
    for (int i = 0; i < kEmbd; i++) error += std::pow(offset.mu()[i] - bias[i], 2) / kEmbd;
    EXPECT_LT(error, 2.0 / 256) << "the mean of 256 rows of unit variance";
    EXPECT_GT(error, 0.2 / 256);
}

TEST(KeyOffset, DoesNotDependOnHowRowsAreCut) {
    const auto pos = iota32(50);
    const auto x = biased_keys(pos, some_bias(), 2);
    KeyOffset one(kHeads, kDim), many(kHeads, kDim);
    one.set_rope(rope()), many.set_rope(rope());
    FirstRows all, parts;
    all.add(x.data(), kEmbd, kEmbd, iota64(50), pos, false);
    for (int i = 49; i >= 0; i--) parts.add(x.data() + i * kEmbd, kEmbd, kEmbd, iota64(1, i), iota32(1, i), false);
    EXPECT_FALSE(all.enough());
    one.measure(all.rows()), many.measure(parts.rows());
    EXPECT_TRUE(std::equal(one.mu().begin(), one.mu().end(), many.mu().begin()));
}

TEST(KeyOffset, TakesTheBiasOutOfTheError) {
    const auto pos = iota32(400);
    const auto rows = iota64(400);
    const auto x = biased_keys(pos, some_bias(), 3);
    double error[2];
    for (const bool on : {false, true}) {
        Cache c(CodecId::turbo3, on);
        if (on) {
            ASSERT_TRUE(c.kv->encode_rows(kernels(), x.data(), kEmbd, rows, pos));
        } else {
            std::vector<std::int64_t> scratch(rows.size());
            for (int h = 0; h < kHeads; h++) ASSERT_TRUE(c.kv->encode(kernels(), h, x.data() + h * kDim, kEmbd, rows, scratch));
        }
        error[on] = stored_error(*c.kv, x, rows, pos);
    }
    // Variance 1 a value remains: 3-bit error .0336 of it. With the bias in, about 60 times the energy is quantized.
    EXPECT_GT(error[1], 0.030);
    EXPECT_LT(error[1], 0.038);
    EXPECT_GT(error[0], 20 * error[1]);
}

TEST(KeyOffset, TokenByTokenIsAsGoodAsABatch) {
    const auto pos = iota32(200);
    const auto x = biased_keys(pos, some_bias(), 4);
    Cache c(CodecId::turbo3);
    for (int i = 0; i < 200; i++) ASSERT_TRUE(c.kv->encode_rows(kernels(), x.data() + i * kEmbd, kEmbd, iota64(1, i), iota32(1, i)));
    EXPECT_FALSE(c.kv->measuring());
    EXPECT_LT(stored_error(*c.kv, x, iota64(200), pos), 0.038);
}

// Saved and restored into an empty cache of another process: the same codes and the same offset, before and after freezing.
TEST(KeyOffset, SavedStateIsLossless) {
    for (const CodecInfo& codec : kCodecs) {
        if (!codec.rotated) continue;
        for (const int n : {10, 200}) {
            const auto pos = iota32(n, 37);
            const auto x = biased_keys(pos, some_bias(), 5);
            Cache a(codec.id), b(codec.id);
            ASSERT_TRUE(a.kv->encode_rows(kernels(), x.data(), kEmbd, iota64(n), pos));
            std::vector<std::uint16_t> saved(n * kEmbd), again(kEmbd);
            for (int i = 0; i < n; i++) a.kv->save_row(i, pos[i], std::span(saved).subspan(i * kEmbd, kEmbd));
            std::vector<std::int32_t> found(n);
            ASSERT_EQ(b.kv->restore_rows(kernels(), 64, n, saved.data(), found.data()), RestoreResult::ok);  // other cells
            EXPECT_EQ(found, pos);
            EXPECT_EQ(a.kv->offset()->frozen(), b.kv->offset()->frozen());
            EXPECT_TRUE(std::equal(a.kv->offset()->mu().begin(), a.kv->offset()->mu().end(), b.kv->offset()->mu().begin()))
                << codec.name << n;
            for (int i = 0; i < n; i++) {
                b.kv->save_row(64 + i, pos[i], again);
                ASSERT_TRUE(std::equal(again.begin(), again.end(), saved.begin() + i * kEmbd)) << codec.name << " n=" << n << " row " << i;
            }
        }
    }
}

TEST(KeyOffset, RowsOfAnF16CacheCanBeRestored) {
    const auto pos = iota32(100);
    const auto x = biased_keys(pos, some_bias(), 6);
    std::vector<std::uint16_t> rows(100 * kEmbd);
    std::transform(x.begin(), x.end(), rows.begin(), to_half);
    Cache c(CodecId::turbo8);
    std::vector<std::int32_t> found(100);
    ASSERT_EQ(c.kv->restore_rows(kernels(), 0, 100, rows.data(), found.data()), RestoreResult::ok);
    EXPECT_EQ(found[5], -1) << "no position is known: kept as it is, without an offset";
    EXPECT_LT(stored_error(*c.kv, x, iota64(100), found), 60 * 1e-4);
}

TEST(KeyOffset, ResetForgets) {
    Cache c(CodecId::turbo4);
    const auto pos = iota32(100);
    const auto x = biased_keys(pos, some_bias(), 7);
    ASSERT_TRUE(c.kv->encode_rows(kernels(), x.data(), kEmbd, iota64(100), pos));
    c.kv->offset()->reset();
    EXPECT_FALSE(c.kv->offset()->frozen());
    for (const float m : c.kv->offset()->mu()) EXPECT_EQ(m, 0);
}

TEST(KeyOffset, StateMovesBetweenFormatsAndOffsets) {
    const auto pos = iota32(100);
    const auto x = biased_keys(pos, some_bias(), 8), y = biased_keys(pos, some_bias(), 9);
    Cache a(CodecId::turbo8), b(CodecId::turbo6);
    ASSERT_TRUE(a.kv->encode_rows(kernels(), x.data(), kEmbd, iota64(100), pos));
    ASSERT_TRUE(b.kv->encode_rows(kernels(), y.data(), kEmbd, iota64(100), pos));  // has another mu, frozen
    std::vector<std::uint16_t> saved(100 * kEmbd);
    for (int i = 0; i < 100; i++) a.kv->save_row(i, pos[i], std::span(saved).subspan(i * kEmbd, kEmbd));
    std::vector<std::int32_t> found(100);
    ASSERT_EQ(b.kv->restore_rows(kernels(), 200, 100, saved.data(), found.data()), RestoreResult::ok);
    EXPECT_LT(stored_error(*b.kv, x, iota64(100, 200), pos), 0.002);
    EXPECT_LT(stored_error(*b.kv, y, iota64(100), pos), 0.002);
    // One row alone does not tell its offset.
    EXPECT_EQ(b.kv->restore_rows(kernels(), 300, 1, saved.data(), found.data()), RestoreResult::offset_missing);
}
