#include "turboquant/cuda/format_tables.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/rotation.h"
#include "turboquant/codec/trellis.h"

namespace turboquant::cuda {
namespace {

constexpr int kFewestCells = 8;

// Cells of width 1/per_unit, cell i from (i - 1/16 - origin) / per_unit on; the first and the last reach to infinity. False if one holds
// two of the ascending boundaries, or a boundary is so near to an edge that rounding could take it to the other side.
bool fill_cells(std::span<const float> bounds, double per_unit, int origin, int first_code, int n, FormatTables& f) {
    constexpr double kMargin = 1e-3;
    std::size_t k = 0;
    for (int i = 0; i < n; ++i) {
        const double end = i + 1 - 1.0 / 16 - origin;
        QuantizerCell& cell = f.cells[i];
        cell = {std::numeric_limits<float>::infinity(), 4 * static_cast<std::uint32_t>(first_code + k)};
        for (int held = 0; k < bounds.size() && (i == n - 1 || bounds[k] * per_unit < end + kMargin); ++k, ++held) {
            if (held || (i < n - 1 && bounds[k] * per_unit > end - kMargin)) return false;
            cell.bound = bounds[k];
        }
    }
    return k == bounds.size();
}

// `both_sides`: boundaries lie about zero, in the middle of the cells; else all are positive.
void make_cells(std::span<const float> bounds, bool both_sides, int first_code, FormatTables& f) {
    const double reach = bounds.empty() ? 1 : bounds.back();
    for (int n = kFewestCells; n <= kMaxCells; n += std::max(2, n / 16 * 2))
        for (int part = 0; part < 16; ++part) {
            const int origin = both_sides ? n / 2 : 0;
            const double per_unit = (n - 2.5 - origin - part / 16.0) / reach;
            if (per_unit > 0 && fill_cells(bounds, per_unit, origin, first_code, n, f)) {
                f.n_cells = n;
                f.cells_per_unit = static_cast<float>(per_unit);
                return;
            }
        }
    throw std::logic_error("cuda: no table of cells for " + std::string(codec_info(f.codec).name) + ", head_dim " +
                           std::to_string(f.head_dim));
}

void make_scalar(FormatTables& f) {
    const Codebook& book = codebook_for(f.bits, f.head_dim);
    f.half = 1 << (f.bits - 1);
    std::copy(book.centroids.begin() + f.half, book.centroids.end(), f.levels + f.half);
    make_cells(std::span(book.boundaries).subspan(f.half), false, f.half, f);
}

void make_trellis(FormatTables& f) {
    const TrellisCodebook& book = trellis_for(f.bits, f.head_dim);
    const std::vector<float>& c = book.centroids;
    constexpr float kOutOfReach = 1e18f;
    std::fill_n(f.levels, 4, -kOutOfReach);
    std::copy(c.begin(), c.end(), f.levels + 4);
    std::fill_n(f.levels + 4 + c.size(), 4, kOutOfReach);
    f.cost_scale = book.cost_scale;
    std::vector<float> middles;
    for (std::size_t i = 0; i + 1 < c.size(); ++i) middles.push_back((c[i] + c[i + 1]) / 2);
    make_cells(middles, true, 0, f);
}

void make_rotation(FormatTables& f) {
    const Rotation& r = rotation_for(f.head_dim);
    for (int d = 0; d < f.head_dim; ++d) {
        f.signs_in[d / 32] |= static_cast<std::uint32_t>(r.signs_in()[d] < 0) << d % 32;
        f.signs_out[d / 32] |= static_cast<std::uint32_t>(r.signs_out()[d] < 0) << d % 32;
    }
    f.unit_scale = 1 / (256 * std::sqrt(static_cast<float>(r.pow2())));
    f.exact = r.odd() == 1;
    f.pow2 = r.pow2(), f.odd = r.odd();
    std::ranges::copy(r.hartley(), f.hartley);
    // What the low four bits of the dim leave of the transform: columns of 16 dims, column = l * blocks + i.
    const int blocks = r.pow2() / 16, n = f.head_dim / 16, tiles = (f.head_dim + 127) / 128;
    const auto entry = [&](int a, int b) {
        if (a >= n || b >= n) return 0.0f;
        const float sign = std::popcount(static_cast<unsigned>(a % blocks & b % blocks)) % 2 ? -1.0f : 1.0f;
        return sign * r.hartley()[static_cast<std::size_t>(a / blocks) * r.odd() + b / blocks];
    };
    for (int k = 0; k < tiles; ++k)
        for (int c = 0; c < tiles; ++c)
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 2; ++i) {
                    const float m = entry(8 * k + 2 * (lane % 4) + i, 8 * c + lane / 4);
                    const std::uint16_t high = to_half(m);
                    const int at = (k * tiles + c) * 32 + lane;
                    f.rotation_high[at] |= static_cast<std::uint32_t>(high) << 16 * i;
                    f.rotation_low[at] |= static_cast<std::uint32_t>(to_half(m - from_half(high))) << 16 * i;
                }
}

}  // namespace

FormatTables make_format_tables(CodecId codec, int head_dim) {
    const CodecInfo& info = codec_info(codec);
    if (!has_fragment_order(codec))
        throw std::invalid_argument("cuda: '" + std::string(info.name) + "' is not encoded on a GPU; use a turbo or tcq format, or raw");
    FormatTables f{};
    f.codec = codec, f.family = info.family, f.bits = info.bits, f.head_dim = head_dim, f.rows = fragment_rows(head_dim);
    make_rotation(f);
    if (info.family == Family::scalar) make_scalar(f);
    if (info.family == Family::trellis) make_trellis(f);
    return f;
}

}  // namespace turboquant::cuda
