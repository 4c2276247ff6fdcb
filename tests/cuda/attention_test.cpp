// GPU attention against the double-precision definition on the same codes: the CPU's grid as far as formats have kernels, and one of its
// own with longer caches, every feature of the arguments, and several sequences.
#include "tests/cuda/attention_rig.h"

#ifdef TQ_HAS_CUDA
#include <gtest/gtest.h>

#include "tests/kernels/grid.h"

namespace turboquant::cuda::test {
namespace {

using enum CodecId;
using turboquant::test::Case;
using turboquant::test::Mask;

constexpr int kGpuHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512};

bool has_kernel(const Case& c) {
    return !is_composite(c.k) && !is_composite(c.v) && !c.mla_out && c.k_dim == c.v_dim && attention_serves(c.k_dim);
}

// Queries have 15 bits: an error of 2e-5 of a logit's size. Levels of 16 bits (turbo5, 6, 8) add 4e-5.
bool has_wide_levels(CodecId id) { return id == turbo5 || id == turbo6 || id == turbo8; }
double bound_of(const Case& c) { return c.n_freq ? 5e-4 : has_wide_levels(c.k) || has_wide_levels(c.v) ? 3e-4 : 2e-4; }

// What the CPU's kernels are tested with.
std::vector<Case> cpu_cases() {
    std::vector<Case> cases;
    for (const Case& c : turboquant::test::attention_grid())
        if (has_kernel(c)) cases.push_back(c);
    return cases;
}

// Formats x head sizes x GQA x lengths x query tokens x masks, sampled: every value of a factor meets most of the others'.
std::vector<Case> sampled_cases() {
    constexpr CodecId formats[] = {turbo4, turbo3, turbo2, turbo5, turbo6, turbo8, raw, tcq4, tcq3, tcq2, tcq5, tcq1};
    constexpr int groups[] = {1, 2, 4, 7, 8, 16}, lengths[] = {1, 63, 64, 65, 1000, 4097}, tokens[] = {1, 2, 5, 8};
    constexpr Mask masks[] = {Mask::none, Mask::causal, Mask::random, Mask::window};
    std::vector<Case> cases;
    for (int i = 0; i < 192; ++i) {
        Case c;
        c.random_codes = true;
        c.k = formats[i % 12], c.v = formats[i / 12 % 2 ? i % 12 : (i * 5 + i / 12) % 12];
        if (c.k == raw || c.v == raw) c.k = c.v = c.k == raw ? c.v : c.k;  // raw lives in another space: both or none
        c.k_dim = c.v_dim = kGpuHeadDims[(i + i / 12) % 8];
        const int group = groups[(i + i / 7) % 6];
        c.n_kv = lengths[(i / 2 + i / 11) % 6], c.n_tokens = std::min(tokens[(i / 3) % 4], c.n_kv);
        c.n_head_kv = c.n_kv > 1000 ? 1 : 2, c.n_head = group * c.n_head_kv;
        c.mask = masks[(i / 5) % 4];
        c.sharpness = i % 3 == 0 ? 1.f : i % 3 == 1 ? 12.f : 60.f;  // flat, ordinary, peaked
        c.sinks = i % 7 == 3, c.softcap = i % 11 == 5 ? 8.f : 0.f, c.max_bias = c.mask == Mask::causal && i % 5 == 0 ? 8.f : 0.f;
        if (i % 4 == 1 && c.k != raw) c.n_freq = c.k_dim / 2, c.successive = i % 8 == 1, c.term_size = i % 16 == 1 ? 30.f : 3.f;
        cases.push_back(c);
    }
    return cases;
}

class CpuGrid : public Gpu, public testing::WithParamInterface<int> {};
class Sampled : public Gpu, public testing::WithParamInterface<int> {};

void check_case(const Case& c) {
    SCOPED_TRACE(testing::PrintToString(c));
    turboquant::test::Problem problem(c);
    const std::vector<float> reference = defined(problem);
    Rig rig(problem.args);
    const std::vector<float> out = rig.run();
    const double error = error_of(out, reference);
    EXPECT_LT(error, bound_of(c));
    // The same bits again: the counters are back at zero and nothing depends on the order of the blocks' ends.
    EXPECT_EQ(rig.run(), out);
}

TEST_P(CpuGrid, IsTheDefinition) { check_case(cpu_cases()[GetParam()]); }
INSTANTIATE_TEST_SUITE_P(Cases, CpuGrid, testing::Range(0, static_cast<int>(cpu_cases().size())));
TEST_P(Sampled, IsTheDefinition) { check_case(sampled_cases()[GetParam()]); }
INSTANTIATE_TEST_SUITE_P(Cases, Sampled, testing::Range(0, static_cast<int>(sampled_cases().size())));

class CudaAttention : public Gpu {};

// Key terms as large as Qwen2.5's: tens of logits, on both ways of computing them.
TEST_F(CudaAttention, LargeOffsets) {
    for (const bool successive : {true, false})
        for (const CodecId id : {turbo4, tcq3}) {
            Case c{.k = id,
                   .v = id,
                   .k_dim = 128,
                   .v_dim = 128,
                   .n_head = 8,
                   .n_head_kv = 2,
                   .n_kv = 1000,
                   .n_freq = 64,
                   .successive = successive};
            c.random_codes = true, c.sharpness = 12, c.term_size = 30;
            check_case(c);
        }
}

// Two groups of rows in a block, tiles of two terms: each group turns by the tile's own term.
TEST_F(CudaAttention, TermsOfTilesInBothGroups) {
    for (const int heads : {8, 16}) {
        Case c{.k = turbo4, .v = turbo4, .k_dim = 128, .v_dim = 128, .n_head = heads, .n_kv = 190, .n_freq = 64, .successive = true};
        c.random_codes = true, c.sharpness = 1, c.term_size = 3;
        check_case(c);
    }
}

// Native causal and window flags are the mask that says the same.
TEST_F(CudaAttention, CausalAndWindowFlags) {
    for (const int tokens : {1, 3, 8})
        for (const Mask mask : {Mask::causal, Mask::window}) {
            Case c{.k = turbo4,
                   .v = turbo3,
                   .k_dim = 128,
                   .v_dim = 128,
                   .n_head = 8,
                   .n_head_kv = 2,
                   .n_tokens = tokens,
                   .n_kv = 700,
                   .mask = mask};
            c.random_codes = true, c.sharpness = 12;
            turboquant::test::Problem problem(c);
            const std::vector<float> reference = defined(problem);
            Rig rig(problem.args);
            rig.args.mask = nullptr, rig.args.causal = true, rig.args.window = mask == Mask::window ? 71 : 0;
            EXPECT_LT(error_of(rig.run(), reference), 2e-4) << tokens << " " << static_cast<int>(mask);
        }
}

// Sequences of different lengths in one launch are what each is alone.
TEST_F(CudaAttention, SequencesOfDifferentLengths) {
    const std::vector<int> lengths{1, 4097, 130, 64, 2000};
    std::vector<std::unique_ptr<turboquant::test::Problem>> problems;
    std::vector<const turboquant::AttentionArgs*> args;
    std::vector<std::vector<float>> alone;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        Case c{.k = tcq3, .v = turbo4, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_kv = lengths[i]};
        c.random_codes = true, c.sharpness = 12;
        problems.push_back(std::make_unique<turboquant::test::Problem>(c, 10 + i));
        args.push_back(&problems.back()->args);
        alone.push_back(defined(*problems.back()));
    }
    for (const bool uniform : {false, true}) {
        Rig rig(args, uniform);
        const std::vector<float> out = rig.run();
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            const std::vector<float> one(out.begin() + static_cast<std::ptrdiff_t>(i * alone[i].size()),
                                         out.begin() + static_cast<std::ptrdiff_t>((i + 1) * alone[i].size()));
            EXPECT_LT(error_of(one, alone[i]), 2e-4) << lengths[i] << " " << uniform;
        }
    }
}

// A captured run replayed on other contents and a shorter length.
TEST_F(CudaAttention, GraphReplay) {
    Case c{.k = turbo3, .v = turbo3, .k_dim = 128, .v_dim = 128, .n_head = 8, .n_head_kv = 2, .n_kv = 3000};
    c.random_codes = true, c.sharpness = 12;
    turboquant::test::Problem problem(c), shorter(c);
    shorter.args.n_kv = 777;
    Rig rig(problem.args);
    const std::vector<float> before = rig.run();
    EXPECT_EQ(rig.replay(3000), before);
    const std::vector<float> reference = defined(shorter);
    EXPECT_LT(error_of(rig.replay(777), reference), 2e-4);
}

// Exact rows beside compressed ones: the definition over both, merged. One sequence, alike ones and ones of different lengths.
TEST_F(CudaAttention, ExactWindows) {
    for (const std::vector<int>& lengths : {std::vector<int>{900}, {300, 300}, {900, 64, 2500}})
        for (const CodecId id : {turbo2, turbo4, tcq3, tcq4, turbo8}) {
            std::vector<std::unique_ptr<turboquant::test::Problem>> problems;
            std::vector<turboquant::test::Problem*> compressed, windows;
            for (std::size_t i = 0; i < lengths.size(); ++i) {
                const int d = id == turbo4 ? 64 : 128;
                Case c{.k = id, .v = id, .k_dim = d, .v_dim = d, .n_head = 8, .n_head_kv = 2, .n_kv = lengths[i]};
                c.random_codes = true, c.sharpness = 12;
                if (id == tcq3) c.n_tokens = 3;
                Case w = c;
                w.k = w.v = raw, w.n_kv = i == 1 ? 200 : lengths.size() == 1 ? 630 : 130;
                if (id == turbo4 || id == tcq3) w.mask = Mask::random;
                problems.push_back(std::make_unique<turboquant::test::Problem>(c, 1 + i));
                compressed.push_back(problems.back().get());
                problems.push_back(std::make_unique<turboquant::test::Problem>(w, 30 + i));
                windows.push_back(problems.back().get());
            }
            EXPECT_LT(exact_window_error(compressed, windows), id == turbo8 ? 3e-4 : 2e-4) << codec_info(id).name << " " << lengths.size();
        }
}

// Tiles whose positions do not succeed each other in pairs: a hole after an odd number of tiles, and a second of a pair that begins a run.
TEST_F(CudaAttention, TermsOfRunsThatBreak) {
    for (const int n_kv : {1000, 640, 4097})
        for (const int hole : {192, 320, 448}) {
            Case c{.k = turbo4,
                   .v = turbo4,
                   .k_dim = 128,
                   .v_dim = 128,
                   .n_head = 8,
                   .n_head_kv = 2,
                   .n_kv = n_kv,
                   .n_freq = 64,
                   .successive = true};
            c.random_codes = true, c.sharpness = 12, c.term_size = 3;
            turboquant::test::Problem problem(c);
            for (int j = hole; j < n_kv; ++j) problem.cell_pos[j] += 64 * 3;
            const std::vector<float> reference = defined(problem);
            Rig rig(problem.args);
            EXPECT_LT(error_of(rig.run(), reference), 5e-4) << n_kv << " " << hole;
        }
}

TEST_F(CudaAttention, RefusesByName) {
    Device device;
    ASSERT_TRUE(query_device(0, device).ok());
    AttentionPlan plan;
    const int n_kv = 100;
    const auto message = [&](AttentionShape s) { return plan_attention(device, s, plan).message(); };
    EXPECT_NE(message({.head_dim = 576, .n_head = 8, .n_head_kv = 1, .n_kv = {&n_kv, 1}}).find("576"), std::string::npos);
    EXPECT_NE(message({.head_dim = 100, .n_head = 8, .n_head_kv = 1, .n_kv = {&n_kv, 1}}).find("head size"), std::string::npos);
    EXPECT_NE(message({.head_dim = 128, .n_head = 7, .n_head_kv = 2, .n_kv = {&n_kv, 1}}).find("multiple"), std::string::npos);
    ASSERT_EQ(message({.head_dim = 128, .n_head = 8, .n_head_kv = 2, .n_kv = {&n_kv, 1}}), "");
    EXPECT_NE(run_attention(plan, {}, nullptr, nullptr).message(), "");
}

}  // namespace
}  // namespace turboquant::cuda::test
#endif
