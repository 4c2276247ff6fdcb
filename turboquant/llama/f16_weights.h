// The same weights in F16. With quantized weights llama.cpp rounds activations to 8 bits before every matrix product; any change in the cache
// flips such roundings, and the flips grow through the layers (KLD .003 on a model of 30 layers). In F16 that floor is 1000 times lower.
#pragma once

#include <string>
#include <utility>

#include "turboquant/llama/monitor.h"
#include "turboquant/llama/temporary_file.h"

namespace turboquant::llama {

/// A GGUF file to load weights from; a temporary one lives as long as this.
class WeightsFile {
  public:
    WeightsFile() = default;
    explicit WeightsFile(std::string path) : path_(std::move(path)) {}
    explicit WeightsFile(TemporaryFile file) : file_(std::move(file)), path_(file_.path()) {}

    const std::string& path() const { return path_; }

  private:
    TemporaryFile file_;
    std::string path_;
};

/// Whether a matrix in the file is of a quantized type. Throws Error if it is no GGUF file.
bool has_quantized_weights(const std::string& path);

/// The file as it is.
inline WeightsFile own_weights(const std::string& path) { return WeightsFile(path); }

/// Dequantizes `path` by llama.cpp's own quantizer into `keep`, or into a temporary file if that is empty. An existing `keep` is used if its
/// tensors are those of `path`. Throws Error if there is no room, the quantizer fails, or `keep` holds something else.
WeightsFile f16_weights(const std::string& path, const std::string& keep, int n_threads, const Monitor& monitor);

}  // namespace turboquant::llama
