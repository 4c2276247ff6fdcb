#include "turboquant/llama/model_id.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <vector>

#include "fmt/format.h"
#include "turboquant/codec/fnv.h"
#include "turboquant/llama/gguf_file.h"

namespace turboquant::llama {

ModelId identify_model(const std::string& path) {
    const GgufFile file(path);
    const gguf_context* gguf = file.gguf();
    std::ifstream in(path, std::ios::binary);
    Fnv1a<std::uint64_t> hash;
    std::vector<char> bytes;
    const auto add = [&](std::size_t from, std::size_t n) {
        bytes.resize(n);
        in.clear();
        in.seekg(static_cast<std::streamoff>(from));
        in.read(bytes.data(), static_cast<std::streamsize>(n));
        hash.add_all(bytes);
    };
    add(0, file.data_offset());  // all metadata and the list of tensors, as they stand in the file
    for (std::int64_t i = 0; i < file.n_tensors(); i++) {
        const std::size_t size = gguf_get_tensor_size(gguf, i);
        add(file.offset(i) + size / 2, std::min<std::size_t>(512, size - size / 2));
    }
    const std::int64_t key = gguf_find_key(gguf, "general.name");
    const bool named = key >= 0 && gguf_get_kv_type(gguf, key) == GGUF_TYPE_STRING;
    return {fmt::format("{:016x}", hash.value()), named ? gguf_get_val_str(gguf, key) : std::filesystem::path(path).filename().string()};
}

}  // namespace turboquant::llama
