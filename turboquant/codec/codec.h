// The list of codecs: the one table that names, sizes, kernels, tests and benchmarks are driven by.
// Adding a codec means adding one row here and, if it packs differently, one file beside this one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace turboquant {

/// Identity of a codec. The numeric values are written into saved state rows: never renumber, only append.
enum class CodecId : std::uint8_t { turbo4 = 1, turbo3 = 2, turbo2 = 3, turbo5 = 4, turbo6 = 5, turbo8 = 6, raw = 7 };

/// What a tile of this codec decodes to before attention reads it.
/// `i8`: int8 centroids, one float scale per vector (bits <= 4: the rounding of centroids costs < 0.5 % of the MSE).
/// `f32`: float centroids, one float scale per vector (finer codecs, for which int8 would be the larger error).
enum class PanelKind : std::uint8_t { i8, f32 };

/// Which side of the cache a vector belongs to: the two are read along different axes and so are laid out differently.
enum class Side : std::uint8_t { key, value };

/// Scale stored with a quantized vector x of norm n whose rotated unit vector y has code vector c:
/// `raw`: n.  `corrected`: n/|c| (the norm is exact).  `eden`: n/<y,c> (unbiased; DRIVE/EDEN 2021-22).
enum class NormMode : std::uint8_t { raw, corrected, eden };

struct CodecInfo {
    CodecId id;
    std::string_view name;
    int bits;            ///< code bits per value
    PanelKind panel;
    bool rotated;        ///< false: stored as it is, in f16, without rotation or scale (`raw`)
};

/// First row = default.
inline constexpr CodecInfo kCodecs[] = {
    {CodecId::turbo4, "turbo4", 4, PanelKind::i8, true},   {CodecId::turbo3, "turbo3", 3, PanelKind::i8, true},
    {CodecId::turbo2, "turbo2", 2, PanelKind::i8, true},   {CodecId::turbo5, "turbo5", 5, PanelKind::f32, true},
    {CodecId::turbo6, "turbo6", 6, PanelKind::f32, true},  {CodecId::turbo8, "turbo8", 8, PanelKind::f32, true},
    {CodecId::raw, "raw", 16, PanelKind::f32, false},
};

/// Row of the table; every CodecId has one.
constexpr const CodecInfo& codec_info(CodecId id) {
    for (const CodecInfo& c : kCodecs)
        if (c.id == id) return c;
    return kCodecs[0];
}

/// Looks a codec up by its name; nullopt if there is none of that name.
constexpr std::optional<CodecId> find_codec(std::string_view name) {
    for (const CodecInfo& c : kCodecs)
        if (c.name == name) return c.id;
    return std::nullopt;
}

/// Head sizes that the rotation and the kernels serve, without padding.
inline constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512, 576};

constexpr bool head_dim_supported(int head_dim) {
    for (int d : kHeadDims)
        if (d == head_dim) return true;
    return false;
}

/// Bits stored per value, scale included: bits + 16/head_dim for rotated codecs, 16 for raw.
constexpr double bits_per_value(CodecId id, int head_dim) {
    const CodecInfo& c = codec_info(id);
    return c.bits + (c.rotated ? 16.0 / head_dim : 0.0);
}

}  // namespace turboquant
