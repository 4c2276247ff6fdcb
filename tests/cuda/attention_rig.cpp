#include "tests/cuda/attention_rig.h"

#ifdef TQ_HAS_CUDA
#include <gtest/gtest.h>

#include <algorithm>

#include "turboquant/codec/rotation.h"

namespace turboquant::cuda::test {

namespace {

/// The definition over the compressed cells, merged with that over the window's rows.
std::vector<float> defined_beside(turboquant::test::Problem& compressed, turboquant::test::Problem& window) {
    const turboquant::AttentionArgs& a = compressed.args;
    const std::size_t d = a.k.shape.head_dim, n_rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    std::vector<float> lse(n_rows), window_lse(n_rows);
    compressed.args.lse = lse.data(), window.args.lse = window_lse.data();
    std::vector<float> expected = defined(compressed);
    // The window's rows are in the rotated space: so must its queries be, and its result comes out of it.
    window.q = compressed.q;
    for (std::size_t r = 0; r < n_rows; ++r) rotation_for(static_cast<int>(d)).forward({window.q.data() + r * d, d});
    std::vector<float> beside = window.run([](const turboquant::AttentionArgs& x) { reference_attention(x); });
    for (std::size_t r = 0; r < n_rows; ++r) {
        rotation_for(static_cast<int>(d)).inverse({beside.data() + r * d, d});
        const double top = std::max(lse[r], window_lse[r]), wa = std::exp(lse[r] - top), wb = std::exp(window_lse[r] - top);
        for (std::size_t i = 0; i < d; ++i)
            expected[r * d + i] = static_cast<float>((wa * expected[r * d + i] + wb * beside[r * d + i]) / (wa + wb));
    }
    return expected;
}

}  // namespace

double exact_window_error(const std::vector<turboquant::test::Problem*>& compressed,
                          const std::vector<turboquant::test::Problem*>& windows) {
    std::vector<float> expected;
    std::vector<const turboquant::AttentionArgs*> calls, beside;
    std::vector<int> n;
    for (std::size_t i = 0; i < compressed.size(); ++i) {
        const std::vector<float> one = defined_beside(*compressed[i], *windows[i]);
        expected.insert(expected.end(), one.begin(), one.end());
        calls.push_back(&compressed[i]->args), beside.push_back(&windows[i]->args), n.push_back(windows[i]->args.n_kv);
    }
    Rig rig(calls, false, true);
    rig.args.exact_k = rig.tiles_of(beside, &turboquant::AttentionArgs::k);
    rig.args.exact_v = rig.tiles_of(beside, &turboquant::AttentionArgs::v);
    rig.args.exact_n = rig.keep(n)->as<std::int32_t>();
    if (beside[0]->mask) {
        // Rows of slots that hold nothing are hidden.
        const std::size_t stride = static_cast<std::size_t>(*std::ranges::max_element(n) + kTileKeys - 1) / kTileKeys * kTileKeys;
        const int n_tokens = calls[0]->n_tokens;
        std::vector<std::uint16_t> mask(beside.size() * n_tokens * stride, kMaskHidden);
        for (std::size_t i = 0; i < beside.size(); ++i)
            for (int t = 0; t < n_tokens; ++t)
                std::copy_n(beside[i]->mask + t * beside[i]->mask_token_stride, n[i], mask.data() + (i * n_tokens + t) * stride);
        rig.args.exact_mask = rig.keep(mask)->as<std::uint16_t>();
        rig.args.exact_mask_token_stride = stride, rig.args.exact_mask_seq_stride = n_tokens * stride;
        rig.summarize(static_cast<int>(stride / kTileKeys));
        EXPECT_EQ(rig.plan.prefill.n_splits > 0, n_tokens > 8);
    }
    return error_of(rig.run(), expected);
}

}  // namespace turboquant::cuda::test
#endif
