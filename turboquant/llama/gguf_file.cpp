#include "turboquant/llama/gguf_file.h"

#include <algorithm>
#include <vector>

#include "fmt/format.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

GgufFile::GgufFile(const std::string& path)
    : gguf_(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = &made_}), gguf_free),
      meta_(made_, ggml_free),
      in_(path, std::ios::binary) {
    if (!gguf_ || !in_) throw Error(fmt::format("cannot read '{}' as a GGUF file; download or convert it again", path));
}

bool GgufFile::read(std::int64_t i, std::int64_t first, std::span<float> out) {
    const ggml_type type = tensor(i)->type;
    const auto n = static_cast<std::int64_t>(out.size());
    std::vector<char> bytes(ggml_row_size(type, n));
    in_.clear();
    in_.seekg(static_cast<std::streamoff>(offset(i) + ggml_row_size(type, first)));
    const bool whole = static_cast<bool>(in_.read(bytes.data(), static_cast<std::streamsize>(bytes.size())));
    if (!whole)
        std::ranges::fill(out, 0.0f);
    else if (type == GGML_TYPE_F32)
        std::copy_n(reinterpret_cast<const float*>(bytes.data()), n, out.data());
    else
        ggml_get_type_traits(type)->to_float(bytes.data(), out.data(), n);
    return whole;
}

}  // namespace turboquant::llama
