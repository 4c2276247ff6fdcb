// Inputs of graphs in memory that the host cannot read: which cells are written, positions of tokens, masks. llama.cpp sets them from host
// memory with every graph, so a copy is kept as they pass, and no graph waits for the device to tell them. Masks of many tokens are too large
// for that (512 tokens over 131,072 cells: 128 MiB a graph): of these it is known that they are there.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

class InputCopies {
  public:
    /// Whether a tensor is of those that are kept.
    static bool keeps(const ggml_tensor* t);
    /// A tensor, or a part of it, is set.
    void set(const ggml_tensor* t, const void* data, std::size_t offset, std::size_t size);
    /// A tensor is written some other way.
    void forget(const ggml_tensor* t) { copies_.erase(t->data); }
    /// What a tensor holds, or null if that is not known: it was computed, or is none that is kept.
    const void* find(const ggml_tensor* t) const;
    /// Whether a tensor has its data already, before the graph is computed, but no copy was kept.
    bool is_there(const ggml_tensor* t) const;

  private:
    struct Copy {
        const ggml_tensor* tensor;
        std::vector<std::uint8_t> bytes;  ///< empty: not copied
    };
    std::unordered_map<const void*, Copy> copies_;  ///< by address
};

}  // namespace turboquant::ggml
