// What a tile is: 64 vectors of one KV head, of one codec, laid out in one order.
#pragma once

#include <cstdint>

#include "turboquant/codec/codec.h"

namespace turboquant {

inline constexpr int kTileKeys = 64;  ///< vectors ("slots") of a tile

/// The order of the bits in a tile. It belongs to the device whose kernels read it: the bytes of a tile mean something to one device only,
/// and what goes from one order to another (saved state, another device) goes in row form (tile.h). Codes, scales and bytes per tile are
/// the same in all. Adding an order means adding a word here, its function (as panel_order.h) and a line in code_bit() and scale_index().
enum class TileOrder : std::uint8_t {
    panels,  ///< of the CPU kernels: panel_order.h
};

inline constexpr TileOrder kTileOrders[] = {TileOrder::panels};

/// Shape of one tile. head_dim must be one of kHeadDims.
struct TileShape {
    CodecId codec;
    Side side;
    int head_dim;
    int n_outliers = 0;  ///< of Family::outliers: channels per head, the same for all heads of a tensor, at most head_dim/2
    TileOrder order = TileOrder::panels;  ///< composites have one order only: composite.h

    friend bool operator==(const TileShape&, const TileShape&) = default;
};

}  // namespace turboquant
