// What llama.cpp's names tell of a cache's tensors.
#pragma once

#include <optional>
#include <string_view>

#include "turboquant/codec/codec.h"

namespace turboquant::ggml {

struct KvName {
    Side side;
    int layer;
};

/// "cache_k_l7" and "cache_v_l7"; nullopt for any other, such as the state of recurrent layers (cache_r, cache_s) and caches beside that of
/// keys and values ("cache_idx_k_l7"): what is done with their rows is a model's own.
constexpr std::optional<KvName> parse_kv_name(std::string_view name) {
    const bool keys = name.starts_with("cache_k_l");
    if ((!keys && !name.starts_with("cache_v_l")) || name.size() == 9) return std::nullopt;
    int layer = 0;
    for (const char c : name.substr(9)) {
        if (c < '0' || c > '9') return std::nullopt;
        layer = layer * 10 + (c - '0');
    }
    return KvName{keys ? Side::key : Side::value, layer};
}

}  // namespace turboquant::ggml
