// The list of codecs: the one table that names, sizes, kernels, tests and benchmarks are driven by.
// Adding a codec means adding one row here and, if it packs differently, one file beside this one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace turboquant {

/// Identity of a codec. The numeric values are written into saved state rows: never renumber, only append.
enum class CodecId : std::uint8_t {
    turbo4 = 1,
    turbo3 = 2,
    turbo2 = 3,
    turbo5 = 4,
    turbo6 = 5,
    turbo8 = 6,
    raw = 7,
    tcq4 = 8,
    tcq3 = 9,
    tcq2 = 10,
    tcq5 = 11,
    tcq1 = 12,
    // Composite formats (composite.h), there to be compared with.
    outlier2 = 64,
    outlier3,
    outlier4,
    split2_3,
    split2_4,
    split3_4,
    split3_5,
    prod2,
    prod3,
    prod4,
    uniform2,
    uniform3,
    uniform4,
};

/// What the levels of a codec are. `int8`: int8 numbers times one step (scalar codes of <= 4 bits: the rounding of centroids costs < 0.5 %
/// of the MSE; trellis codes: their levels were trained in int8). `real`: floats (finer codecs, for which int8 would be the larger error).
enum class Levels : std::uint8_t { int8, real };

/// Bit planes of a code, low bits first: plane k holds the next `width` bits of all codes. Of trellis codecs the last plane is the trellis
/// bits. In which order a plane's bits lie in a tile is the tile's order (shape.h).
class Planes {
  public:
    constexpr Planes() = default;
    constexpr Planes(std::initializer_list<std::uint8_t> widths) {
        for (const std::uint8_t w : widths) widths_[n_++] = w;
    }
    constexpr const std::uint8_t* begin() const { return widths_; }
    constexpr const std::uint8_t* end() const { return widths_ + n_; }
    constexpr int bits() const {
        int sum = 0;
        for (const int w : *this) sum += w;
        return sum;
    }

  private:
    std::uint8_t widths_[4] = {};
    int n_ = 0;
};

/// Which side of the cache a vector belongs to: the two are read along different axes and so are laid out differently.
enum class Side : std::uint8_t { key, value };

/// Scale stored with a quantized vector x of norm n whose rotated unit vector y has code vector c:
/// `plain`: n.  `corrected`: n/|c| (the norm is exact).  `eden`: n/<y,c> (unbiased; DRIVE/EDEN 2021-22).
enum class NormMode : std::uint8_t { plain, corrected, eden };

/// What costs least divergence (docs/quality.md): values are averaged, so an unbiased scale lets their errors cancel (5 % at 2 bits, 7 to
/// 14 % at 1, nothing from 3 on); in keys its larger error counts.
constexpr NormMode default_norm_mode(Side side) { return side == Side::value ? NormMode::eden : NormMode::corrected; }

/// How a codec is built. The last four are composite: composite.h.
enum class Family : std::uint8_t {
    scalar,    ///< one rotation, one codebook, one scale
    raw,       ///< f16 as it is
    trellis,   ///< one rotation, one scale, trellis-coded levels: trellis.h
    outliers,  ///< channels of large RMS at outlier_bits, how many is measured (TileShape::n_outliers); the rest as scalar
    split,     ///< the quarter of the channels with the largest RMS at outlier_bits, the rest at bits, each part as scalar
    prod,      ///< bits-1 as scalar and one bit of sign sketch of the residual
    uniform,   ///< uniform levels in the model's space, groups of 32 channels
};

struct CodecInfo {
    CodecId id;
    std::string_view name;
    int bits;       ///< code bits per value
    Planes planes;  ///< as wide as the codes; none: a composite, which has a layout of its own
    Levels levels;
    bool rotated;  ///< attention works in the rotated space; false: in the model's space, without scales (`raw`, composites)
    Family family = Family::scalar;
    int outlier_bits = 0;  ///< of the outlier channels, if the family has them
};

/// First row = default.
inline constexpr CodecInfo kCodecs[] = {
    {CodecId::turbo4, "turbo4", 4, {4}, Levels::int8, true},
    {CodecId::turbo3, "turbo3", 3, {2, 1}, Levels::int8, true},
    {CodecId::turbo2, "turbo2", 2, {2}, Levels::int8, true},
    {CodecId::turbo5, "turbo5", 5, {4, 1}, Levels::real, true},
    {CodecId::turbo6, "turbo6", 6, {4, 2}, Levels::real, true},
    {CodecId::turbo8, "turbo8", 8, {8}, Levels::real, true},
    {CodecId::raw, "raw", 16, {16}, Levels::real, false, Family::raw},
    {CodecId::tcq4, "tcq4", 4, {2, 1, 1}, Levels::int8, true, Family::trellis},
    {CodecId::tcq3, "tcq3", 3, {2, 1}, Levels::int8, true, Family::trellis},
    {CodecId::tcq2, "tcq2", 2, {1, 1}, Levels::int8, true, Family::trellis},
    {CodecId::tcq5, "tcq5", 5, {2, 1, 1, 1}, Levels::int8, true, Family::trellis},
    {CodecId::tcq1, "tcq1", 1, {1}, Levels::int8, true, Family::trellis},
    {CodecId::outlier2, "outlier2", 2, {}, Levels::real, false, Family::outliers, 8},
    {CodecId::outlier3, "outlier3", 3, {}, Levels::real, false, Family::outliers, 8},
    {CodecId::outlier4, "outlier4", 4, {}, Levels::real, false, Family::outliers, 8},
    {CodecId::split2_3, "split2_3", 2, {}, Levels::real, false, Family::split, 3},
    {CodecId::split2_4, "split2_4", 2, {}, Levels::real, false, Family::split, 4},
    {CodecId::split3_4, "split3_4", 3, {}, Levels::real, false, Family::split, 4},
    {CodecId::split3_5, "split3_5", 3, {}, Levels::real, false, Family::split, 5},
    {CodecId::prod2, "prod2", 2, {}, Levels::real, false, Family::prod},
    {CodecId::prod3, "prod3", 3, {}, Levels::real, false, Family::prod},
    {CodecId::prod4, "prod4", 4, {}, Levels::real, false, Family::prod},
    {CodecId::uniform2, "uniform2", 2, {}, Levels::real, false, Family::uniform},
    {CodecId::uniform3, "uniform3", 3, {}, Levels::real, false, Family::uniform},
    {CodecId::uniform4, "uniform4", 4, {}, Levels::real, false, Family::uniform},
};

/// Row of the table, or null: no codec has this id (a byte of a foreign or damaged file).
constexpr const CodecInfo* find_codec_info(CodecId id) {
    for (const CodecInfo& c : kCodecs)
        if (c.id == id) return &c;
    return nullptr;
}
/// The same for an id that is known to be good, as all that did not come from outside. Throws std::invalid_argument if it is not.
constexpr const CodecInfo& codec_info(CodecId id) {
    if (const CodecInfo* c = find_codec_info(id)) return *c;
    throw std::invalid_argument("codec: no codec has this id; the file it comes from is damaged or was written by a later version");
}

static_assert([] {
    for (const CodecInfo& c : kCodecs)
        if (c.planes.bits() != (c.planes.bits() ? c.bits : 0)) return false;
    return true;
}());

/// Looks a codec up by its name; nullopt if there is none of that name.
constexpr std::optional<CodecId> find_codec(std::string_view name) {
    for (const CodecInfo& c : kCodecs)
        if (c.name == name) return c.id;
    return std::nullopt;
}

/// Formats that are decoded as a whole, tile by tile, into the model's space (composite.h): there to be compared with, not for speed, and
/// so no devices of their own in stock tools.
constexpr bool is_composite(CodecId id) { return codec_info(id).family >= Family::outliers; }
/// Family::outliers: channels above so many times their head's median RMS are outliers, unless a SPEC says otherwise.
inline constexpr float kOutlierRatio = 3;
/// Composites whose outlier channels are chosen by measuring the first rows.
constexpr bool has_outliers(CodecId id) { return codec_info(id).outlier_bits > 0; }

/// Head sizes that the rotation and the kernels serve, without padding.
inline constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512, 576};
inline constexpr int kMaxHeadDim = kHeadDims[sizeof kHeadDims / sizeof kHeadDims[0] - 1];

constexpr bool head_dim_supported(int head_dim) {
    for (int d : kHeadDims)
        if (d == head_dim) return true;
    return false;
}
/// "64, 80, ..., 576": for messages. Sizes above `most` are left out.
std::string supported_head_dims(int most = kMaxHeadDim);

}  // namespace turboquant
