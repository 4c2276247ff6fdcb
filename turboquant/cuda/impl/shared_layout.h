// What host and device must agree on about a block: its warps, its shared memory, and the shapes there are instances of.
#pragma once

#include <cstddef>
#include <string_view>

#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/impl/format_table.h"

namespace turboquant::cuda {

inline constexpr int kWarps = 4;

/// Groups of four query rows per block that there are kernels for, ascending; 0 ends.
/// More groups would share the look-ups among more rows, but four spill: slower than two blocks of two.
struct GroupCounts {
    int n[3];
};
constexpr GroupCounts kernel_groups(int head_dim) {
    if (head_dim == 512) return {{1, 0, 0}};
    return {{1, 2, 0}};
}
/// No index into kFragmentCodecs: formats are chosen at run time for each head and side.
inline constexpr int kAnyFormat = -1;
/// Index of a format into kFragmentCodecs, by name; kAnyFormat for "any".
consteval int format_named(std::string_view name) {
    for (int i = 0; i < kFragmentCodecCount; ++i)
        if (codec_info(kFragmentCodecs[i]).name == name) return i;
    if (name != "any") throw "no such format";
    return kAnyFormat;
}
/// What a kernel is compiled for, beside its head size and groups. Kernels that know their format have no spills and no switch; what a call
/// does not need costs no registers.
struct KernelKind {
    int format = kAnyFormat;  ///< of keys and values of all heads
    bool term = false;        ///< calls with a score term
};

/// Whether there are kernels that know this format (CMakeLists.txt makes them).
constexpr bool has_own_kernels(int head_dim, int format) {
    if ((head_dim != 64 && head_dim != 128) || format < 0) return false;
    const int bits = codec_info(kFragmentCodecs[format]).bits;
    return bits >= 2 && bits <= 4;
}

/// 16-byte chunks of a lane that are loaded one tile ahead, each of keys and values.
constexpr int kernel_ahead(int head_dim) { return head_dim == 64 ? 4 : 8; }
/// Blocks per multiprocessor that the registers must allow. `format`: the one that the kernel knows, or kAnyFormat.
constexpr int kernel_blocks(int head_dim, int groups, int format) {
    if (groups != 1 || head_dim > 128) return 2;
    return format != kAnyFormat && kFragmentCodecs[format] == CodecId::turbo2 ? 4 : 3;
}

/// Of a warp and group: operands of the score term while it is made, terms of two tiles afterwards.
constexpr std::size_t staged_bytes(int term_pad) { return term_pad / 16 * 512 > 2048 ? term_pad / 16 * 512 : 2048; }

/// Offsets in bytes. Two phases share the memory: up to the last tile, and the merge.
struct SharedLayout {
    std::size_t rows, operands, row_top, lut, ab, panel, staged, arrived;  // first
    std::size_t of_warps, state, result, total, last, weights;             // second
    std::size_t bytes;
};
constexpr SharedLayout shared_layout(int head_dim, int groups, int term_pad, int n_terms, int n_splits) {
    SharedLayout l{};
    const std::size_t rows = 4 * groups, d = head_dim;
    std::size_t at = 0;
    const auto take = [&at](std::size_t n) {
        const std::size_t from = at;
        at += (n + 15) / 16 * 16;
        return from;
    };
    l.rows = take(rows * d * 4);
    l.operands = take(groups * 2 * fragment_rows(head_dim) * 128);
    l.row_top = take(rows * 4);
    l.lut = take(2 * 256 * 4);
    if (term_pad) {
        l.ab = take(n_terms * rows * (term_pad + 2) * 8);
        l.panel = take(term_pad * std::size_t{512});
        l.staged = take(kWarps * groups * staged_bytes(term_pad));
        l.arrived = take(8);
    }
    const std::size_t first = at;
    at = 0;
    l.of_warps = take(kWarps * rows * (d + 4) * 4);
    l.state = take(kWarps * rows * 8);
    l.result = take(rows * d * 4);
    l.total = take(rows * 8);
    l.last = take(4);
    l.weights = take(rows * n_splits * 4);
    l.bytes = first > at ? first : at;
    return l;
}

}  // namespace turboquant::cuda
