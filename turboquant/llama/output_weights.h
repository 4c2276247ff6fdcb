// What attention's output projection makes of a head's output, read from the model file.
#pragma once

#include <string>
#include <vector>

namespace turboquant::llama {

/// W^T W of the part of layer's output projection that reads one query head, [v_head_dim][v_head_dim]: |W x|^2 = x^T (W^T W) x is what an error x
/// of the head's output puts into the residual stream. By query head, ascending; empty if the file has no blk.<layer>.attn_output.weight of
/// n_heads * v_head_dim columns. Throws Error if the file cannot be read.
std::vector<std::vector<float>> output_metrics(const std::string& path, int layer, int n_heads, int v_head_dim);

}  // namespace turboquant::llama
