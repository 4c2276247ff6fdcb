// Batches of several tensors, encoded by one launch where they are alike: byte by byte what each is alone.
#include <gtest/gtest.h>

#include <memory>

#include "tests/cuda/encode_batch.h"

#ifdef TQ_HAS_CUDA
namespace turboquant::cuda::test {
namespace {

using enum CodecId;

class EncodeTogether : public Gpu {
  protected:
    using Batches = std::vector<std::unique_ptr<Batch>>;

    /// Batches of the formats in turn, keys and values, each with vectors of its own.
    static Batches batches(std::span<const CodecId> codecs, std::size_t n_jobs, int d, int n) {
        Batches all;
        for (std::size_t i = 0; i < n_jobs; ++i) {
            const bool key = i % 2 == 0;
            all.push_back(
                std::make_unique<Batch>(TileShape{codecs[i % codecs.size()], key ? Side::key : Side::value, d},
                                        Options{.n = n, .offset = key && i % 4 == 0, .scales = key && i % 3 == 0, .half = i % 5 == 3}));
            Batch& b = *all.back();
            for (std::size_t k = 0; k < b.x.size(); ++k) b.x[k] *= 1 + .3f * static_cast<float>((k * (i + 3)) % 7);
            b.d_x.write(b.x);
        }
        return all;
    }
    static std::vector<EncodeJob> jobs(const Batches& all) {
        std::vector<EncodeJob> jobs;
        for (const auto& b : all) jobs.push_back({b->plan, b->args()});
        return jobs;
    }
    static void compare(const Batches& all) {
        std::vector<std::vector<std::uint8_t>> alone;
        for (const auto& b : all) {
            ok(encode(b->plan, b->args(), nullptr));
            alone.push_back(b->tiles.read());
            ASSERT_NE(alone.back(), b->old);
            b->tiles.write(b->old);
        }
        ok(encode_together(jobs(all), nullptr));
        ok(cudaDeviceSynchronize());
        for (std::size_t i = 0; i < all.size(); ++i) ASSERT_EQ(all[i]->tiles.read(), alone[i]) << "job " << i;
    }
};

TEST_F(EncodeTogether, IsWhatEachIsAlone) {
    constexpr CodecId mixed[] = {turbo4, tcq3, turbo2, tcq2, turbo8, tcq4, turbo3}, scalar[] = {turbo4}, trellis[] = {tcq3};
    for (const int d : {64, 80, 128, 256})
        for (const int n : {1, 3, 8, 16, 32, 33})  // the last by a launch each
            for (const std::size_t n_jobs : {std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{16}, std::size_t{17}}) {
                if (n_jobs == 7 || d == 128) {
                    SCOPED_TRACE(std::to_string(d) + ", " + std::to_string(n) + " tokens, " + std::to_string(n_jobs) + " jobs");
                    compare(batches(mixed, n_jobs, d, n));
                    if (HasFatalFailure()) return;
                }
                if (n_jobs != 16) continue;
                compare(batches(scalar, n_jobs, d, n));
                compare(batches(trellis, n_jobs, d, n));
                if (HasFatalFailure()) return;
            }
}

TEST_F(EncodeTogether, NotAlike) {
    constexpr CodecId codecs[] = {turbo4, raw, tcq3};
    compare(batches(codecs, 3, 128, 4));
    Batches sizes = batches(codecs, 1, 128, 4);
    sizes.push_back(std::move(batches(codecs, 1, 64, 4)[0]));
    sizes.push_back(std::move(batches(codecs, 1, 128, 5)[0]));
    compare(sizes);
}

// Each says of its own vectors whether they are finite.
TEST_F(EncodeTogether, NotFinite) {
    constexpr CodecId codecs[] = {turbo4, tcq3};
    const Batches all = batches(codecs, 6, 128, 4);
    for (const std::size_t i : {std::size_t{2}, std::size_t{5}}) {
        all[i]->x[2 * kHeads * 128 + 5] = std::nanf("");
        all[i]->d_x.write(all[i]->x);
    }
    ok(encode_together(jobs(all), nullptr));
    ok(cudaDeviceSynchronize());
    for (std::size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i]->bad.read()[0], i == 2 || i == 5) << i;
}

}  // namespace
}  // namespace turboquant::cuda::test
#endif
