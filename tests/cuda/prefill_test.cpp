// Prefill on the GPU: against the double-precision definition, against the decode kernels, and its choice by the plan.
#include "tests/cuda/attention_rig.h"

#ifdef TQ_HAS_CUDA
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <thread>

namespace turboquant::cuda::test {
namespace {

using enum CodecId;
using turboquant::test::Case;
using turboquant::test::Mask;
using turboquant::test::Problem;

// Formats x head sizes x GQA x lengths x query tokens x masks, sampled.
std::vector<Case> prefill_cases() {
    constexpr CodecId formats[] = {turbo4, turbo3, turbo2, tcq4, tcq3, tcq2, tcq5, tcq1};
    constexpr int dims[] = {128, 64, 80, 96, 112}, groups[] = {4, 1, 2, 7, 8}, lengths[] = {1000, 65, 129, 300, 4097, 64, 128},
                  tokens[] = {9, 40, 130, 33, 16, 64};
    constexpr Mask masks[] = {Mask::none, Mask::causal, Mask::random, Mask::window, Mask::some_rows_empty};
    std::vector<Case> cases;
    for (int i = 0; i < 96; ++i) {
        Case c;
        c.random_codes = true;
        c.k = formats[i % 8], c.v = formats[i / 8 % 2 ? i % 8 : (i * 5 + i / 8) % 8];
        c.k_dim = c.v_dim = dims[(i + i / 8) % 5];
        c.n_kv = lengths[(i / 2 + i / 11) % 7], c.n_tokens = std::min(tokens[(i / 3) % 6], c.n_kv);
        c.n_head_kv = c.n_kv > 1000 ? 1 : 2, c.n_head = groups[(i + i / 7) % 5] * c.n_head_kv;
        c.mask = masks[(i / 5) % 5], c.mask_heads = i % 13 == 4 ? c.n_head : 1;
        c.sharpness = i % 3 == 0 ? 1.f : i % 3 == 1 ? 12.f : 60.f;  // flat, ordinary, peaked
        c.sinks = i % 7 == 3, c.softcap = i % 11 == 5 ? 8.f : 0.f, c.max_bias = c.mask == Mask::causal && i % 4 == 0 ? 8.f : 0.f;
        cases.push_back(c);
    }
    return cases;
}

class Prefill : public Gpu, public testing::WithParamInterface<int> {};
TEST_P(Prefill, IsTheDefinition) {
    const Case c = prefill_cases()[GetParam()];
    SCOPED_TRACE(testing::PrintToString(c));
    Problem problem(c);
    const std::vector<float> reference = defined(problem);
    Rig rig(problem.args);
    ASSERT_GT(rig.plan.prefill.n_splits, 0) << "the plan did not choose prefill";
    const std::vector<float> out = rig.run();
    EXPECT_LT(error_of(out, reference), 2e-4);
    EXPECT_EQ(rig.run(), out) << "not the same bits again";
}
INSTANTIATE_TEST_SUITE_P(Cases, Prefill, testing::Range(0, static_cast<int>(prefill_cases().size())));

class CudaPrefill : public Gpu {};

// The offset added to the keys is the score term of the definition: two offsets, successive and scattered positions, cells without.
TEST_F(CudaPrefill, OffsetTerm) {
    constexpr CodecId formats[] = {turbo4, tcq3, turbo2, tcq4, turbo3};
    constexpr int dims[] = {128, 64, 80, 96, 112};
    for (int i = 0; i < 20; ++i) {
        Case c{.k = formats[i % 5], .v = formats[i % 3], .k_dim = dims[i / 2 % 5], .v_dim = dims[i / 2 % 5], .n_head = 8, .n_head_kv = 2};
        c.n_tokens = i % 4 ? 40 : 9, c.n_kv = i % 3 ? 300 : 1000, c.random_codes = true, c.sharpness = i % 2 ? 12.f : 1.f;
        c.mask = i % 5 == 1 ? Mask::causal : Mask::none, c.successive = i % 2, c.n_freq = c.k_dim / (i % 7 == 6 ? 4 : 2);
        SCOPED_TRACE(testing::PrintToString(c));
        Problem problem(c);
        const int d = c.k_dim, n = c.n_freq, group = c.n_head / c.n_head_kv, n_terms = problem.args.term.n_terms;
        const float size = (i % 2 ? 30.f : 3.f) / (c.sharpness * std::sqrt(static_cast<float>(2 * n)) * problem.args.scale);
        std::vector<float> offset(static_cast<std::size_t>(n_terms) * c.n_head_kv * 2 * d);
        std::vector<std::uint8_t> dim_freq(d, 255);
        for (int f = 0; f < n; ++f) dim_freq[f] = dim_freq[f + n] = static_cast<std::uint8_t>(f);
        for (int id = 0; id < n_terms; ++id)
            for (int h = 0; h < c.n_head_kv; ++h) {
                float* at = offset.data() + (static_cast<std::size_t>(id) * c.n_head_kv + h) * 2 * d;
                for (int f = 0; f < n; ++f) {
                    const float u = size * std::sin(1.7f * static_cast<float>(f + 5 * h + 11 * id)),
                                v = size * std::cos(2.3f * static_cast<float>(f + h));
                    at[f] = u, at[d + f] = -v, at[f + n] = v, at[d + f + n] = u;
                    for (int row = 0; row < c.n_tokens * c.n_head; ++row) {
                        if (row % c.n_head / group != h) continue;
                        const float x = problem.q[static_cast<std::size_t>(row) * d + f],
                                    y = problem.q[static_cast<std::size_t>(row) * d + f + n];
                        float* q_term = problem.q_term.data() + (static_cast<std::size_t>(id) * c.n_tokens * c.n_head + row) * 2 * n;
                        q_term[f] = x * u + y * v, q_term[f + n] = y * u - x * v;
                    }
                }
            }
        const std::vector<float> reference = defined(problem);
        Rig rig(problem.args), decode({&problem.args}, false, false, false);
        ASSERT_TRUE(rig.plan.prefill.wide);
        rig.args.term.offset = rig.keep(offset)->as<float>(), rig.args.term.dim_freq = rig.keep(dim_freq)->as<std::uint8_t>();
        const std::vector<float> out = rig.run();
        EXPECT_LT(error_of(out, reference), 5e-4);
        EXPECT_EQ(rig.run(), out) << "not the same bits again";
        if (2 * n == d) {  // the decode kernels make the term of the offset
            std::vector<std::int32_t> ids(n_terms);
            for (int id = 0; id < n_terms; ++id) ids[id] = id;
            decode.args.term.q_term = nullptr, decode.args.term.mu = decode.keep(offset)->as<float>();
            decode.args.term.mu_stride = offset.size() / n_terms, decode.args.term.ids = decode.keep(ids)->as<std::int32_t>();
            decode.args.term.rope = {d, 0, false};
            EXPECT_LT(error_of(decode.run(), reference), 5e-4);
        }
        std::printf("d %d %s term error %.1e\n", d, std::string(codec_info(c.k).name).c_str(), error_of(out, reference));
    }
}

// Exact rows as one more part: with masks, over head sizes and GQA, rows that do not fill a block, one sequence and two.
TEST_F(CudaPrefill, ExactRows) {
    for (int i = 0; i < 15; ++i) {
        constexpr int dims[] = {128, 64, 80, 96, 112}, groups[] = {4, 1, 3};
        std::vector<std::unique_ptr<Problem>> problems;
        std::vector<Problem*> compressed, windows;
        for (int s = 0; s < (i % 4 == 3 ? 2 : 1); ++s) {
            Case c{.k = turbo4, .v = tcq3, .k_dim = dims[i % 5], .v_dim = dims[i % 5], .n_head = 2 * groups[i % 3], .n_head_kv = 2};
            c.n_tokens = i % 2 ? 40 : 9 + 70 * (i % 5), c.n_kv = 500 + 200 * s, c.random_codes = true,
            c.sharpness = i % 3 == 2 ? 40.f : 12.f;
            c.mask = i % 5 == 4 ? Mask::random : Mask::none, c.softcap = i % 7 == 5 ? 8.f : 0.f;
            Case w = c;
            w.k = w.v = raw, w.n_kv = s ? 330 : 400 + i, w.mask = i % 2 ? Mask::random : Mask::window;
            problems.push_back(std::make_unique<Problem>(c, 1 + i + s)), compressed.push_back(problems.back().get());
            problems.push_back(std::make_unique<Problem>(w, 30 + i + s)), windows.push_back(problems.back().get());
        }
        EXPECT_LT(exact_window_error(compressed, windows), 2e-4) << i;
    }
}

// Native causal and window flags are the mask that says the same; the decode kernels give the same.
TEST_F(CudaPrefill, FlagsAndDecodeKernels) {
    for (const int tokens : {9, 200})
        for (const Mask mask : {Mask::none, Mask::causal, Mask::window}) {
            Case c{.k = turbo4,
                   .v = tcq3,
                   .k_dim = 128,
                   .v_dim = 128,
                   .n_head = 8,
                   .n_head_kv = 2,
                   .n_tokens = tokens,
                   .n_kv = 1500,
                   .mask = mask};
            c.random_codes = true, c.sharpness = 12;
            Problem problem(c);
            const std::vector<float> reference = defined(problem);
            Rig rig(problem.args), decode({&problem.args}, false, false, false);
            for (Rig* r : {&rig, &decode}) {
                r->args.mask = nullptr, r->args.causal = mask != Mask::none, r->args.window = mask == Mask::window ? 71 : 0;
                r->args.mask_heads = 1;
            }
            ASSERT_GT(rig.plan.prefill.n_splits, 0);
            ASSERT_EQ(decode.plan.prefill.n_splits, 0);
            const std::vector<float> out = rig.run();
            EXPECT_LT(error_of(out, reference), 2e-4) << tokens << " " << static_cast<int>(mask);
            EXPECT_LT(error_of(out, decode.run()), 2e-4) << tokens << " " << static_cast<int>(mask);
        }
}

// Heads of different formats, sequences of different lengths, all in one launch.
TEST_F(CudaPrefill, HeadsAndSequences) {
    const std::vector<int> lengths{20, 2049, 130, 64, 700};
    std::vector<std::unique_ptr<Problem>> problems;
    std::vector<const turboquant::AttentionArgs*> args;
    std::vector<std::vector<float>> alone;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        Case c{.k_dim = 128, .v_dim = 128, .n_head = 12, .n_head_kv = 3, .n_tokens = 20, .n_kv = lengths[i]};
        c.k_heads = {turbo3, tcq2, tcq5}, c.v_heads = {tcq4, turbo4, turbo2};
        c.random_codes = true, c.sharpness = 12;
        problems.push_back(std::make_unique<Problem>(c, 10 + i));
        args.push_back(&problems.back()->args), alone.push_back(defined(*problems.back()));
    }
    Rig rig(args, false);
    ASSERT_GT(rig.plan.prefill.n_splits, 0);
    const std::vector<float> out = rig.run();
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        const std::vector<float> one(out.begin() + static_cast<std::ptrdiff_t>(i * alone[i].size()),
                                     out.begin() + static_cast<std::ptrdiff_t>((i + 1) * alone[i].size()));
        EXPECT_LT(error_of(one, alone[i]), 2e-4) << lengths[i];
    }
}

TEST_F(CudaPrefill, GraphReplay) {
    Case c{.k = turbo3, .v = turbo3, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_tokens = 50, .n_kv = 3000};
    c.random_codes = true, c.sharpness = 12;
    Problem problem(c), shorter(c);
    shorter.args.n_kv = 777;
    Rig rig(problem.args);
    ASSERT_GT(rig.plan.prefill.n_splits, 0);
    const std::vector<float> before = rig.run();
    EXPECT_EQ(rig.replay(3000), before);
    EXPECT_LT(error_of(rig.replay(777), defined(shorter)), 2e-4);
}

// Codes that another stream writes, after which there is an event.
TEST_F(CudaPrefill, CodesThatComeLater) {
    Case c{.k = turbo4, .v = turbo4, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_tokens = 50, .n_kv = 3000};
    c.random_codes = true, c.sharpness = 12;
    Problem problem(c);
    Rig rig(problem.args);
    const std::vector<float> before = rig.run();
    cudaStream_t side;
    cudaEvent_t there;
    must(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    must(cudaEventCreateWithFlags(&there, cudaEventDisableTiming));
    const auto run = [&](bool waits) {
        std::vector<std::unique_ptr<DeviceBytes>> codes;
        must(cudaLaunchHostFunc(
            side, [](void*) { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }, nullptr));
        for (const Tiles* t : {&rig.args.k, &rig.args.v}) {
            const std::size_t n = t->seq_stride;
            auto* to = const_cast<std::uint8_t*>(t->tiles);
            codes.push_back(std::make_unique<DeviceBytes>(n));
            must(cudaMemcpy(codes.back()->as<void>(), to, n, cudaMemcpyDeviceToDevice));
            must(cudaMemset(to, 0, n));
            must(cudaStreamSynchronize(nullptr));
            must(cudaMemcpyAsync(to, codes.back()->as<void>(), n, cudaMemcpyDeviceToDevice, side));
        }
        must(cudaEventRecord(there, side));
        rig.args.codes_ready = waits ? there : nullptr;
        const std::vector<float> out = rig.run();
        must(cudaStreamSynchronize(side));
        return out;
    };
    EXPECT_EQ(run(true), before);
    EXPECT_NE(run(false), before);
    must(cudaEventDestroy(there));
    must(cudaStreamDestroy(side));
}

// What prefill cannot do, or is slower at, goes to the decode kernels, by the plan where it knows.
TEST_F(CudaPrefill, ChosenByThePlan) {
    Device device;
    ASSERT_TRUE(query_device(0, device).ok());
    const int n_kv = 1000;
    const auto chosen = [&](AttentionShape s) {
        AttentionPlan plan;
        EXPECT_EQ(plan_attention(device, s, plan).message(), "");
        return plan.prefill.n_splits > 0;
    };
    const bool can = device.compute_capability == 90;
    const CodecId bytes[] = {turbo4, tcq3}, wide[] = {turbo4, turbo8}, one[] = {turbo4, turbo4};
    AttentionShape s{.head_dim = 128, .n_head = 8, .n_head_kv = 2, .n_tokens = 9, .n_kv = {&n_kv, 1}, .formats = bytes};
    EXPECT_EQ(chosen(s), can);
    AttentionShape other = s;
    other.n_tokens = 8;
    EXPECT_FALSE(chosen(other));
    other = s, other.formats = wide;
    EXPECT_FALSE(chosen(other));
    other = s, other.formats = {};
    EXPECT_FALSE(chosen(other));
    other = s, other.head_dim = 256;
    EXPECT_FALSE(chosen(other));
    other = s, other.exact_windows = true;
    EXPECT_EQ(chosen(other), can);
    // Kernels that know their format take drafts: 4 rows a token.
    other = s, other.formats = one;
    EXPECT_FALSE(chosen(other));
    other.n_tokens = 15;
    EXPECT_EQ(chosen(other), can);
    other.term = true;
    EXPECT_FALSE(chosen(other));
    other.n_tokens = 21;
    EXPECT_EQ(chosen(other), can);
}

}  // namespace
}  // namespace turboquant::cuda::test
#endif
