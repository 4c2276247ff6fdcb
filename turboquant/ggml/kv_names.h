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

/// "cache_k_l7" and "cache_v_l7", with or without a tag before the letter; nullopt for any other, such as the state of recurrent layers
/// (cache_r, cache_s).
constexpr std::optional<KvName> parse_kv_name(std::string_view name) {
    const std::size_t l = name.rfind("_l");
    if (!name.starts_with("cache_") || l == name.npos || l == 0 || l + 2 >= name.size()) return std::nullopt;
    int layer = 0;
    for (const char c : name.substr(l + 2)) {
        if (c < '0' || c > '9') return std::nullopt;
        layer = layer * 10 + (c - '0');
    }
    if (name[l - 1] == 'k') return KvName{Side::key, layer};
    if (name[l - 1] == 'v') return KvName{Side::value, layer};
    return std::nullopt;
}

}  // namespace turboquant::ggml
