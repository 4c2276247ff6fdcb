// Formats with a body of their own in the kernels, and their look-ups. Plain data.
#pragma once

#include <cstdint>

#include "turboquant/codec/codec.h"

namespace turboquant::cuda {

/// In the order of their look-up tables.
inline constexpr CodecId kFragmentCodecs[] = {CodecId::turbo2, CodecId::turbo3, CodecId::turbo4, CodecId::turbo5,
                                              CodecId::turbo6, CodecId::turbo8, CodecId::tcq1,   CodecId::tcq2,
                                              CodecId::tcq3,   CodecId::tcq4,   CodecId::tcq5,   CodecId::raw};
inline constexpr int kFragmentCodecCount = 12;

constexpr int fragment_codec_index(CodecId id) {
    for (int i = 0; i < kFragmentCodecCount; ++i)
        if (kFragmentCodecs[i] == id) return i;
    return -1;
}

/// Look-ups of one format at one head size: bytes of the levels in the order in which formats.cuh forms its selectors.
struct FormatTable {
    std::uint32_t prmt[8];
    float step;  // level = integer * step
};

}  // namespace turboquant::cuda
