// What nodes of a graph depend on, copied, to tell whether others do the same: operations, their parameters, and where all data lies.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

class NodeRecord {
  public:
    void clear() { nodes_.clear(), sources_.clear(); }
    void add(const ggml_tensor* node) {
        nodes_.push_back(*node);
        for (const ggml_tensor* src : node->src)
            if (src) sources_.push_back(Source(src));
    }
    /// Whether the nodes that `next` tells one after the other, and null at last, are those that were added.
    template <class Next>
    bool equals(Next&& next) const {
        std::size_t i = 0, s = 0;
        for (const ggml_tensor* node = next(); node; node = next(), i++) {
            if (i == nodes_.size() || std::memcmp(node, &nodes_[i], sizeof *node) != 0) return false;
            for (const ggml_tensor* src : node->src)
                if (src && (s == sources_.size() || !sources_[s++].is(src))) return false;
        }
        return i == nodes_.size() && s == sources_.size();
    }

  private:
    struct Source {
        const void* data;
        int type;
        std::int64_t ne[GGML_MAX_DIMS];
        std::size_t nb[GGML_MAX_DIMS];

        explicit Source(const ggml_tensor* t) : data(t->data), type(t->type) {
            std::memcpy(ne, t->ne, sizeof ne);
            std::memcpy(nb, t->nb, sizeof nb);
        }
        bool is(const ggml_tensor* t) const {
            return data == t->data && type == t->type && std::memcmp(ne, t->ne, sizeof ne) == 0 && std::memcmp(nb, t->nb, sizeof nb) == 0;
        }
    };
    static_assert(std::is_trivially_copyable_v<ggml_tensor>);

    std::vector<ggml_tensor> nodes_;
    std::vector<Source> sources_;  ///< of all nodes
};

}  // namespace turboquant::ggml
