// Where the KV tensors of a context lie that does not have all of them on the device it was given: llama.cpp leaves layers that are not
// offloaded to the CPU, in f16, without a word.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

/// Watches the graphs of one context for KV tensors in foreign buffers.
class Placement {
  public:
    /// A context begins.
    void begin() { seen_.clear(), told_ = false; }
    /// Nothing of the model is here: the warning; there will be no other.
    std::string none_here();
    /// Takes the KV tensor that a SET_ROWS of a graph writes, in a buffer that is not ours; `ours` are the layers that are. Returns the
    /// warning once all of a graph's were seen (a graph is shown more than once, in its order), else "".
    std::string see(const ggml_tensor* tensor, const std::set<int>& ours);

  private:
    std::vector<const ggml_tensor*> seen_;
    bool told_ = false;
};

}  // namespace turboquant::ggml
