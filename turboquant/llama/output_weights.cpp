#include "turboquant/llama/output_weights.h"

#include <cstdint>

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

const OutputMetrics& OutputWeights::metrics(int layer, int n_heads, int v_head_dim) {
    const auto found = known_.find(layer);
    return found != known_.end() ? found->second : known_[layer] = read(layer, n_heads, v_head_dim);
}

OutputMetrics OutputWeights::read(int layer, int n_heads, int v_head_dim) {
    const std::int64_t id = file_.find(fmt::format("blk.{}.attn_output.weight", layer));
    if (id < 0) return {};
    const ggml_tensor* t = file_.tensor(id);
    const auto columns = static_cast<std::size_t>(t->ne[0]), d = static_cast<std::size_t>(v_head_dim);
    if (columns != static_cast<std::size_t>(n_heads) * d || (t->type != GGML_TYPE_F32 && !ggml_get_type_traits(t->type)->to_float))
        return {};
    std::vector<float> row(columns);
    OutputMetrics metrics(static_cast<std::size_t>(n_heads), std::vector<float>(d * d));
    for (std::int64_t r = 0; r < t->ne[1]; r++) {
        if (!file_.read(id, r * t->ne[0], row)) throw Error(fmt::format("'{}' ends within its tensors; download it again", path_));
        for (std::size_t h = 0; h < metrics.size(); h++) {
            const float* w = row.data() + h * d;
            for (std::size_t i = 0; i < d; i++)
                for (std::size_t j = 0; j < d; j++) metrics[h][i * d + j] += w[i] * w[j];
        }
    }
    return metrics;
}

}  // namespace turboquant::llama
