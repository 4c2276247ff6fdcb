// What the prefill kernels share: sizes of their operands in memory, and what a launch hands to them.
//
// A panel is the operand form of 128 cells of a KV head, made once for all query rows: keys as 128 rows of signed bytes (row = position of
// the cell in its tile, fragment_order.h), then their scales; values as head_dim rows of 128 bytes (byte = the place of the key's weight
// in the other operand), then the largest scale of the 128 values and each one's share of it in units of 1/kWeightTop.
// Wide panels, for calls with an offset term: a key is its levels times its scale plus the offset, turned to its position and rotated, in
// 15 bits as two planes, high bytes and low ones, with one scale for both.
// Rows are 128 bytes in the swizzle that warpgroup instructions read (wgmma.cuh); keys and queries are padded to that.
#pragma once

#include "turboquant/codec/shape.h"
#include "turboquant/cuda/impl/params.h"

namespace turboquant::cuda {

inline constexpr int kPanelKeys = 128, kPanelRow = 128;
inline constexpr int kGroupRows = 64;     ///< query rows of a warpgroup
inline constexpr int kPrefillGroups = 2;  ///< warpgroups per block that compute
inline constexpr int kPrefillRows = kGroupRows * kPrefillGroups;
inline constexpr int kPrefillThreads = 128 * (kPrefillGroups + 1);
constexpr int panel_stages(bool wide) { return wide ? 3 : 4; }
/// A weight, in 16 bits, of the largest logit at the largest scale; less than 65535, as rounding puts logits up to 2^-11 above the largest.
inline constexpr float kWeightTop = 65500;

/// Byte of 4-byte word `word` of row `row` of an operand.
constexpr int swizzled(int row, int word) { return row * kPanelRow + ((word / 4 ^ row % 8) * 16) + word % 4 * 4; }

/// Offsets in bytes within a panel.
struct PanelLayout {
    int keys, key_scales, values, value_scales, bytes;
};
inline constexpr int kKeyPlane = kPanelKeys * kPanelRow, kKeyScaleBytes = kPanelKeys * 4, kValueScaleBytes = 16 + kPanelKeys * 4;
constexpr int value_plane(int head_dim) { return head_dim * kPanelRow; }
constexpr int key_bytes(bool wide) { return wide ? 2 * kKeyPlane : kKeyPlane; }
constexpr PanelLayout panel_layout(int head_dim, bool wide) {
    PanelLayout l{};
    l.key_scales = key_bytes(wide);
    l.values = l.key_scales + kKeyScaleBytes;
    l.value_scales = l.values + value_plane(head_dim);
    l.bytes = l.value_scales + kValueScaleBytes;
    return l;
}

/// Query operands of a warpgroup: high bytes, then low ones.
inline constexpr int kQueryPlane = kGroupRows * kPanelRow;

/// Shared memory of a block.
struct PrefillShared {
    int queries, keys, values, key_scales, value_scales, barriers, bytes;
};
constexpr PrefillShared prefill_shared(bool wide) {
    const int stages = panel_stages(wide);
    PrefillShared l{};
    l.keys = kPrefillGroups * 2 * kQueryPlane;
    l.values = l.keys + stages * key_bytes(wide);
    l.key_scales = l.values + stages * kKeyPlane;
    l.value_scales = l.key_scales + stages * kKeyScaleBytes;
    l.barriers = l.value_scales + stages * kValueScaleBytes;
    l.bytes = l.barriers + (4 * stages + 1) * 8;
    return l;
}

struct PrefillParams {
    AttentionParams a;
    std::uint8_t* panels;   // [seq][kv head][panel]
    int n_panels;           // of each sequence, at most
    std::uint8_t* queries;  // [seq][kv head][group of 64 rows][high, low][row]
    float* units;           // [seq][kv head][row, padded]: logit in units of log2 of an integer score times its key's scale
    int n_groups;           // of 64 rows, even
    int n_splits, n_parts;  // the exact rows' part is the last
    float* part;            // [seq][part][kv head][row, padded][head_dim]
    float2* part_ml;        // [seq][part][kv head][row, padded]
};

}  // namespace turboquant::cuda
