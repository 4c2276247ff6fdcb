// Compressed rows as the fp16 that ggml believes in, for operations that have no form for compressed ones: sparse attention copies or
// gathers rows, attention with a bias of its own multiplies matrices.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/ggml/buffer.h"

namespace turboquant::ggml {

class DecodedSources {
  public:
    /// Decodes what `op` can see of compressed rows. Empty, or why that cannot be; then `node()` is the operation on decoded rows, good
    /// until the next call.
    std::string decode(const Device& device, StoreContext& ctx, const ggml_tensor* op);
    ggml_tensor* node() { return &node_; }

  private:
    using Copy = std::unique_ptr<ggml_backend_buffer, void (*)(ggml_backend_buffer_t)>;
    template <std::size_t... I>
    static std::array<Copy, sizeof...(I)> none(std::index_sequence<I...>) {
        return {(static_cast<void>(I), Copy(nullptr, ggml_backend_buffer_free))...};
    }
    ggml_tensor node_{};
    std::array<ggml_tensor, GGML_MAX_SRC> sources_{};
    std::array<std::vector<std::uint16_t>, GGML_MAX_SRC> rows_;
    /// The same where the host's memory will not do, in buffers of our type.
    std::array<Copy, GGML_MAX_SRC> copies_ = none(std::make_index_sequence<GGML_MAX_SRC>());
};

}  // namespace turboquant::ggml
