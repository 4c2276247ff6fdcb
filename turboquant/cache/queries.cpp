#include "turboquant/cache/queries.h"

namespace turboquant {
namespace {

/// f(t, h, row) for each query row, split over tokens.
template <class F>
void for_each_query(Executor& executor, const AttentionArgs& a, F&& f) {
    const int parts = a.n_tokens < 16 ? 1 : executor.n_threads();
    executor.run(parts, [&](int ith) {
        for (int t = ith; t < a.n_tokens; t += parts)
            for (int h = 0; h < a.n_head; h++) f(t, h, static_cast<std::size_t>(t) * a.n_head + h);
    });
}

}  // namespace

void transform_queries(StoreContext& ctx, int head_dim, const QueryTransform& queries, AttentionArgs& a) {
    const KeyTransform& keys = queries.keys;
    const auto d = static_cast<std::size_t>(head_dim), rows = static_cast<std::size_t>(a.n_tokens) * a.n_head;
    const int group = a.n_head / a.n_head_kv;
    if (keys.scales) {
        ctx.scaled_q.resize(rows * d);
        for_each_query(*ctx.executor, a, [&](int t, int h, std::size_t row) {
            const float *q = a.q + t * a.q_token_stride + h * a.q_head_stride, *s = keys.scales + h / group * d;
            for (std::size_t i = 0; i < d; i++) ctx.scaled_q[row * d + i] = q[i] / s[i];
        });
        a.q = ctx.scaled_q.data(), a.q_head_stride = d, a.q_token_stride = a.n_head * d;
    }
    if (queries.ids.empty()) return;
    const auto width = static_cast<std::size_t>(2 * keys.rope.n_freq);
    ctx.q_terms.resize(queries.ids.size() * rows * width);
    for (std::size_t i = 0; i < queries.ids.size(); i++) {
        const float* mu = keys.mu[queries.ids[i]];
        for_each_query(*ctx.executor, a, [&](int t, int h, std::size_t row) {
            query_terms(keys.rope, head_dim, mu + 2 * (h / group) * d, a.q + t * a.q_token_stride + h * a.q_head_stride,
                        ctx.q_terms.data() + (i * rows + row) * width);
        });
    }
    a.term.q_term = ctx.q_terms.data();
}

}  // namespace turboquant
