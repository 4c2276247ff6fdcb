#include "turboquant/llama/output_weights.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <memory>

#include "fmt/format.h"
#include "ggml.h"
#include "gguf.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

std::vector<std::vector<float>> output_metrics(const std::string& path, int layer, int n_heads, int v_head_dim) {
    ggml_context* raw_meta = nullptr;
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> file(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = &raw_meta}),
                                                                   gguf_free);
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> meta(raw_meta, ggml_free);
    if (!file) throw Error(fmt::format("cannot read '{}' as a GGUF file; download or convert it again", path));
    const std::string name = fmt::format("blk.{}.attn_output.weight", layer);
    const std::int64_t id = gguf_find_tensor(file.get(), name.c_str());
    if (id < 0) return {};
    const ggml_tensor* t = ggml_get_tensor(meta.get(), name.c_str());
    const auto columns = static_cast<std::size_t>(t->ne[0]), d = static_cast<std::size_t>(v_head_dim);
    const ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;
    if (columns != static_cast<std::size_t>(n_heads) * d || (t->type != GGML_TYPE_F32 && !to_float)) return {};
    std::ifstream in(path, std::ios::binary);
    in.seekg(static_cast<std::streamoff>(gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), id)));
    std::vector<char> bytes(ggml_row_size(t->type, t->ne[0]));
    std::vector<float> row(columns);
    std::vector<std::vector<float>> metrics(static_cast<std::size_t>(n_heads), std::vector<float>(d * d));
    for (std::int64_t r = 0; r < t->ne[1]; r++) {
        if (!in.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
            throw Error(fmt::format("'{}' ends within its tensors; download it again", path));
        if (t->type == GGML_TYPE_F32)
            std::copy_n(reinterpret_cast<const float*>(bytes.data()), columns, row.data());
        else
            to_float(bytes.data(), row.data(), t->ne[0]);
        for (std::size_t h = 0; h < metrics.size(); h++) {
            const float* w = row.data() + h * d;
            for (std::size_t i = 0; i < d; i++)
                for (std::size_t j = 0; j < d; j++) metrics[h][i * d + j] += w[i] * w[j];
        }
    }
    return metrics;
}

}  // namespace turboquant::llama
