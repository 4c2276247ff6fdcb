#include "turboquant/cache/layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace turboquant {

std::size_t reserved_bytes(const KvGeometry& g) {
    const std::int64_t tiles = (g.n_cells + kTileKeys - 1) / kTileKeys * g.n_streams;
    const auto windows = static_cast<std::size_t>(g.windows.bits(g.n_cells, g.n_embd, kHeadDims[0])) / 8 * g.n_streams;
    std::size_t most = 0;
    for (const int d : kHeadDims) {
        if (g.n_embd % d != 0) continue;
        std::size_t heads = 0;
        for (int h = 0; h < g.codecs.count(); h++) heads += tile_bytes({g.codecs.of(h), g.side, d, d / 2});
        if (!g.codecs.mixed()) heads *= g.n_embd / d;
        if (!g.codecs.mixed() || g.n_embd / d == g.codecs.count()) most = std::max(most, tiles * heads);
    }
    return windows + (most ? most : static_cast<std::size_t>(tiles) * kTileKeys * g.n_embd * sizeof(std::uint16_t));
}

Layout::Layout(const KvGeometry& g, int head_dim) : g_(g), head_dim_(head_dim) {
    if (!head_dim_supported(head_dim) || g_.n_embd % head_dim) {
        throw std::invalid_argument("head size " + std::to_string(head_dim) + " (row of " + std::to_string(g_.n_embd) +
                                    " values) is not supported; supported: " + supported_head_dims() +
                                    ". Run this model without a turboquant device");
    }
    if (g_.codecs.mixed() && n_head() != g_.codecs.count())
        throw std::invalid_argument("formats for " + std::to_string(g_.codecs.count()) + " KV heads (" + to_string(g_.codecs) +
                                    "), but this layer has " + std::to_string(n_head()) + "; name one format for each, or one for all");
    std::size_t at = 0;
    for (int h = 0; g_.codecs.mixed() && h < n_head(); h++) heads_.push_back({g_.codecs.of(h), at}), at += tile_bytes(shape(h));
}

std::size_t Layout::row_bytes() const {
    std::size_t bytes = 0;
    for (int h = 0; h < n_head(); h++) bytes += turboquant::row_bytes(g_.codecs.of(h), head_dim_);
    return bytes;
}

}  // namespace turboquant
