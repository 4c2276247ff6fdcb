// A row kept in fp16 beside the cache while something is measured on it: exactly as it would be saved (saved_row.h), so that saving and
// restoring it changes nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace turboquant {

struct KeptRow {
    std::int64_t row;
    std::int32_t pos;                   ///< -1: unknown
    std::vector<std::uint16_t> values;  ///< n_embd fp16 values, model's space, keys after RoPE; empty: the store has them still
    std::int32_t place = -1;            ///< then where (TileStore::set_aside)
};

}  // namespace turboquant
