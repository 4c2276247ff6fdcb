// What nodes of a graph depend on, copied, to tell whether others do the same: operations, their parameters, and where all data lies.
#pragma once

#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "turboquant/ggml/abi.h"

namespace turboquant::ggml {

class NodeRecord {
  public:
    void assign(std::span<const ggml_tensor* const> nodes) {
        nodes_.clear(), sources_.clear();
        for (const ggml_tensor* node : nodes) {
            nodes_.push_back(*node);
            for (const ggml_tensor* src : node->src)
                if (src) sources_.push_back(Source(src));
        }
    }
    /// Whether these nodes are those that were assigned.
    bool equals(std::span<const ggml_tensor* const> nodes) const {
        if (nodes.size() != nodes_.size()) return false;
        std::size_t s = 0;
        for (std::size_t i = 0; i < nodes.size(); i++) {
            if (std::memcmp(nodes[i], &nodes_[i], sizeof nodes_[i]) != 0) return false;
            for (const ggml_tensor* src : nodes[i]->src)
                if (src && (s == sources_.size() || !sources_[s++].is(src))) return false;
        }
        return s == sources_.size();
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
