// Compressed rows as the fp16 that ggml believes in, for operations that have no form for compressed ones: sparse attention copies or
// gathers rows, attention with a bias of its own multiplies matrices.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "turboquant/ggml/buffer.h"

namespace turboquant::ggml {

class DecodedSources {
  public:
    /// Decodes what `op` can see of compressed rows. Empty, or why that cannot be; then `node()` is the operation on decoded rows, good
    /// until the next call.
    std::string decode(StoreContext& ctx, const ggml_tensor* op);
    ggml_tensor* node() { return &node_; }

  private:
    ggml_tensor node_{};
    std::array<ggml_tensor, GGML_MAX_SRC> sources_{};
    std::array<std::vector<std::uint16_t>, GGML_MAX_SRC> rows_;
};

}  // namespace turboquant::ggml
