// Rotary position embedding as llama.cpp applies it, for one vector: needed to move cached keys (context shift).
// Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071; parameter meaning as in ggml's ROPE op.
#pragma once

#include <span>
#include <utility>
#include <vector>

namespace turboquant {

enum class RopePairs { adjacent, split };  ///< (2i, 2i+1), or (i, i + n_dims/2) as in GPT-NeoX

struct RopeParams {
    int n_dims = 0;    ///< rotated dims, even; the rest of the vector is left alone
    int n_offset = 0;  ///< first rotated dim
    RopePairs pairs = RopePairs::adjacent;
    float freq_base = 10000, freq_scale = 1;
    int n_ctx_orig = 0;  ///< YaRN: original context length
    float ext_factor = 0, attn_factor = 1, beta_fast = 32, beta_slow = 1;
    const float* freq_factors = nullptr;  ///< n_dims/2 divisors of the angles, or null

    friend bool operator==(const RopeParams&, const RopeParams&) = default;
};

/// Indices of the two values that pair i rotates.
constexpr std::pair<int, int> rope_pair(const RopeParams& p, int i) {
    return p.pairs == RopePairs::adjacent ? std::pair(p.n_offset + 2 * i, p.n_offset + 2 * i + 1)
                                          : std::pair(p.n_offset + i, p.n_offset + i + p.n_dims / 2);
}

/// The same rotation without YaRN's magnitude factor: keys that are moved by a shift have it already (llama.cpp's own cache scales them
/// once more with every shift).
RopeParams without_magnitude(RopeParams p);

/// Angle per position of every pair, n_dims/2 of them. llama.cpp multiplies them up in float for each position, which is off by about 1e-7
/// of the angle either way; these are the same without that.
std::vector<double> rope_frequencies(const RopeParams& p);
/// YaRN's factor on what is rotated (its attention factor included); 1 without YaRN.
float rope_magnitude(const RopeParams& p);
/// cos and sin (times the magnitude) for every pair at position `pos`: table[2*i] = cos, table[2*i+1] = sin, i < n_dims/2.
void rope_table(const RopeParams& p, float pos, std::span<float> table);
/// Rotates x in place with a table of rope_table.
void rope_apply(const RopeParams& p, std::span<const float> table, std::span<float> x);

}  // namespace turboquant
