// How many tokens of each sequence stay in fp16 beside the compressed cache.
#pragma once

#include <algorithm>
#include <cstdint>

namespace turboquant {

/// Tokens of each sequence. By default both together take 1/256 of the context, which costs 1/16 bit per value at any length: the first
/// four at most (large models attend to them as a resting place), for the rest the most recent ones (docs/quality.md: a third of the
/// divergence is left with them).
struct WindowSizes {
    static constexpr int kAuto = -1;
    int sink = kAuto, recent = kAuto;

    bool any() const { return sink > 0 || recent > 0; }
    /// Takes over what is given in `other`.
    void set(const WindowSizes& other) {
        if (other.sink != kAuto) sink = other.sink;
        if (other.recent != kAuto) recent = other.recent;
    }
    /// The sizes in a cache of n_cells cells per stream.
    WindowSizes resolve(std::int64_t n_cells) const {
        const int both = static_cast<int>(n_cells / 256), first = both < 16 ? both / 4 : 4;
        return {sink == kAuto ? first : sink, recent == kAuto ? both - first : recent};
    }
    /// What resolved windows take in a stream of n_cells rows of n_embd values.
    double bits(std::int64_t n_cells, std::int64_t n_embd) const {
        return 16.0 * static_cast<double>(std::min<std::int64_t>(sink + recent, n_cells) * n_embd);
    }
    friend bool operator==(const WindowSizes&, const WindowSizes&) = default;
};

}  // namespace turboquant
