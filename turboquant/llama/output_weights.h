// What attention's output projection makes of a head's output, read from the model file.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "turboquant/llama/gguf_file.h"

namespace turboquant::llama {

/// [query head][v_head_dim * v_head_dim]: W^T W of the part of a layer's output projection that reads the head: |W x|^2 = x^T (W^T W) x is what
/// an error x of the head's output puts into the residual stream.
using OutputMetrics = std::vector<std::vector<float>>;

class OutputWeights {
  public:
    /// Throws Error if the file cannot be read.
    explicit OutputWeights(const std::string& path) : path_(path), file_(path) {}

    /// Of a layer, read when it is first asked for; empty if the file has no blk.<layer>.attn_output.weight of n_heads * v_head_dim columns.
    /// Throws Error if the file ends within it.
    const OutputMetrics& metrics(int layer, int n_heads, int v_head_dim);

  private:
    OutputMetrics read(int layer, int n_heads, int v_head_dim);

    std::string path_;
    GgufFile file_;
    std::map<int, OutputMetrics> known_;
};

}  // namespace turboquant::llama
