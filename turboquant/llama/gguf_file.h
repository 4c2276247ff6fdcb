// A GGUF file: its list of tensors, and their values as floats.
#pragma once

#include <cstdint>
#include <fstream>
#include <memory>
#include <span>
#include <string>

#include "ggml.h"
#include "gguf.h"

namespace turboquant::llama {

class GgufFile {
  public:
    /// Throws Error if it cannot be read.
    explicit GgufFile(const std::string& path);

    const gguf_context* gguf() const { return gguf_.get(); }
    std::int64_t n_tensors() const { return gguf_get_n_tensors(gguf_.get()); }
    const char* name(std::int64_t i) const { return gguf_get_tensor_name(gguf_.get(), i); }
    /// -1: there is none.
    std::int64_t find(const std::string& name) const { return gguf_find_tensor(gguf_.get(), name.c_str()); }
    /// Type and shape; no data.
    const ggml_tensor* tensor(std::int64_t i) const { return ggml_get_tensor(meta_.get(), name(i)); }
    std::size_t data_offset() const { return gguf_get_data_offset(gguf_.get()); }
    /// Where tensor i begins in the file.
    std::size_t offset(std::int64_t i) const { return data_offset() + gguf_get_tensor_offset(gguf_.get(), i); }

    /// Values of tensor i from value `first` on, whole blocks of its type, which ggml can convert to floats. False, and zeros, if the file ends
    /// before.
    bool read(std::int64_t i, std::int64_t first, std::span<float> out);

  private:
    ggml_context* made_ = nullptr;
    std::unique_ptr<gguf_context, decltype(&gguf_free)> gguf_;
    std::unique_ptr<ggml_context, decltype(&ggml_free)> meta_;
    std::ifstream in_;
};

}  // namespace turboquant::llama
