#include "turboquant/llama/model_id.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <vector>

#include "fmt/format.h"
#include "gguf.h"
#include "turboquant/codec/fnv.h"
#include "turboquant/llama/error.h"

namespace turboquant::llama {

ModelId identify_model(const std::string& path) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> gguf(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = nullptr}),
                                                                   gguf_free);
    std::ifstream in(path, std::ios::binary);
    if (!gguf || !in) throw Error(fmt::format("cannot read '{}' as a GGUF file; download or convert it again", path));
    Fnv1a<std::uint64_t> hash;
    std::vector<char> bytes;
    const auto add = [&](std::size_t from, std::size_t n) {
        bytes.resize(n);
        in.clear();
        in.seekg(static_cast<std::streamoff>(from));
        in.read(bytes.data(), static_cast<std::streamsize>(n));
        hash.add_all(bytes);
    };
    const std::size_t data = gguf_get_data_offset(gguf.get());
    add(0, data);  // all metadata and the list of tensors, as they stand in the file
    for (std::int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); i++) {
        const std::size_t size = gguf_get_tensor_size(gguf.get(), i), at = data + gguf_get_tensor_offset(gguf.get(), i);
        add(at + size / 2, std::min<std::size_t>(512, size - size / 2));
    }
    const std::int64_t key = gguf_find_key(gguf.get(), "general.name");
    const bool named = key >= 0 && gguf_get_kv_type(gguf.get(), key) == GGUF_TYPE_STRING;
    return {fmt::format("{:016x}", hash.value()),
            named ? gguf_get_val_str(gguf.get(), key) : std::filesystem::path(path).filename().string()};
}

}  // namespace turboquant::llama
