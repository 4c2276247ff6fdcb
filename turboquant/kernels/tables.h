// Constants of one (codec, head size) in the plain form that the kernels read: nothing here calls a function, so it may be included in
// translation units that are compiled for a stronger machine (docs/kernels.md, one definition).
#pragma once

#include <cstdint>

#include "turboquant/codec/residual.h"
#include "turboquant/codec/tile.h"
#include "turboquant/codec/trellis.h"

namespace turboquant {

inline constexpr int kEncodeBins = 4096;  // uniform bins over the codebook's range, so narrow that each holds at most one boundary

struct CodecTables {
    CodecId codec;
    int bits;
    int head_dim;
    bool i8;  // decodes to int8 centroids, else to floats
    bool rotated;

    // Composites: decodes a whole tile into a float panel in the model's space; nothing below but the rotation is then filled. Else null.
    void (*decode)(const TileShape& shape, const std::uint8_t* tile, float* panel);

    // Decode.
    alignas(64) std::int8_t lut[16];  // int8 centroids, repeated to fill 16 entries
    float lut_step;                   // centroid = lut * lut_step
    alignas(64) float centroids[256];

    // Encode, by symmetry on |t|: level k = number of boundaries <= |t|, code = half + k or half-1-k.
    int half;                        // 2^(bits-1) levels on either side
    float bounds[129];               // half-1 positive boundaries, then +inf
    float levels[128];               // half positive levels
    float bins_per_unit;             // bin of |t| = |t| * bins_per_unit
    std::uint8_t bins[kEncodeBins];  // level at the bin's lower edge

    // Trellis codecs (codec/trellis.h); trellis_lut[point | subset << (bits-1)].
    bool trellis;
    std::int8_t trellis_lut[64];
    float trellis_levels[4][16], trellis_bounds[4][16];  // per subset: levels, midpoints between them
    float trellis_cost_scale;
    std::uint8_t trellis_subset[64];  // of window 2*j, j < 64

    // Rotation: y = signs_out * T * signs_in * x.
    int pow2, odd;
    float rotation_norm;  // 1/sqrt(pow2)
    const float *signs_in, *signs_out, *hartley;
};

/// Shared instance, built on first use, thread-safe; null if there is no such codec or the head size is not supported.
const CodecTables* find_codec_tables(CodecId codec, int head_dim);
/// The same where both are known to be good. Throws std::invalid_argument if they are not.
const CodecTables& codec_tables(CodecId codec, int head_dim);
/// Of the levels of residuals (codec/residual.h): those of turbo4.
inline const CodecTables& residual_tables(int head_dim) { return codec_tables(CodecId::turbo4, head_dim); }

}  // namespace turboquant
