// Small pieces of data on their way to places on the device, all by one launch: a copy of each costs the host several microseconds, in which
// the GPU idles at the beginning of a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

/// Plain data that a launch takes along: kernels of all drivers may have 4 KB of arguments.
struct Pieces {
    static constexpr int kMost = 24;
    static constexpr std::size_t kRoom = 3584;

    std::uint32_t* to[kMost];
    std::uint16_t end[kMost];  ///< of piece i's words; they begin where those of the piece before end
    int n = 0;
    std::uint32_t words[kRoom / 4];

    /// False: there is no room, or it is not made of whole words. `host` may be changed then.
    bool add(void* device, const void* host, std::size_t bytes) {
        const std::size_t begin = n ? end[n - 1] : 0, count = bytes / 4;
        if (n == kMost || bytes % 4 || reinterpret_cast<std::uintptr_t>(device) % 4 || begin + count > kRoom / 4) return false;
        std::memcpy(words + begin, host, bytes);
        to[n] = static_cast<std::uint32_t*>(device), end[n] = static_cast<std::uint16_t>(begin + count), n++;
        return true;
    }
};
static_assert(sizeof(Pieces) <= 4000);

/// In the stream's order, and those added later over those added before.
Status send(const Pieces& pieces, Stream stream);

}  // namespace turboquant::cuda
