// Panels: what the CPU kernels decode a tile into before attention reads it.
#pragma once

#include "turboquant/codec/codec.h"

namespace turboquant {

/// `i8`: int8 levels, one float scale per vector. `f32`: float levels, one float scale per vector; or values (`raw`, composites).
/// The order of a panel is that of the codes in a tile (codec/panel_order.h), which is why the tiles are laid out as they are.
enum class PanelKind : std::uint8_t { i8, f32 };

constexpr PanelKind panel_kind(CodecId id) { return codec_info(id).levels == Levels::int8 ? PanelKind::i8 : PanelKind::f32; }

}  // namespace turboquant
