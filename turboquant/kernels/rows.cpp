#include "turboquant/kernels/rows.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

constexpr std::size_t kMinVectors = 64;  // fewer are not worth a second thread

/// Rows whose cells lie in one tile.
struct Run {
    std::size_t first, n;
};
std::vector<Run> runs_of(std::span<const std::int64_t> cells) {
    std::vector<Run> runs;
    for (std::size_t i = 0; i < cells.size(); ++i)
        if (runs.empty() || cells[i] / kTileKeys != cells[i - 1] / kTileKeys)
            runs.push_back({i, 1});
        else
            ++runs.back().n;
    return runs;
}

/// f(run, head) for all of them, in parts of successive runs. f must not throw.
template <class F>
void for_each_run(Executor& executor, std::span<const std::int64_t> cells, int n_head, F f) {
    const std::vector<Run> runs = runs_of(cells);
    const auto n = static_cast<std::int64_t>(runs.size()) * n_head;
    const std::int64_t threads = cells.size() * n_head < kMinVectors ? 1 : executor.n_threads();
    const int parts = static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(n, 1)));
    executor.run(parts, [&](int ith) {
        for (std::int64_t u = n * ith / parts; u < n * (ith + 1) / parts; ++u) f(runs[u / n_head], static_cast<int>(u % n_head));
    });
}

void check_row_form(const StreamTiles& tiles) {
    if (is_composite(tiles.shape.codec)) throw std::invalid_argument("rows: composite formats have no row form");
}

std::vector<std::size_t> row_offsets(const StreamTiles& tiles) {
    std::vector<std::size_t> at(1, 0);
    for (int h = 0; h < tiles.n_head; ++h) at.push_back(at.back() + row_bytes(tiles.head_shape(h).codec, tiles.shape.head_dim));
    return at;
}

TileRows tile_rows(const StreamTiles& tiles, std::span<const std::int64_t> cells, const Run& run, int head, std::uint8_t* rows,
                   std::size_t stride) {
    const std::int64_t* first = cells.data() + run.first;
    return {tiles.head_shape(head),
            tiles.head_tiles(head) + *first / kTileKeys * tiles.tile_stride,
            first,
            static_cast<int>(run.n),
            rows + run.first * stride,
            stride};
}

const CodecTables& tables_of(const StreamTiles& tiles, int head) {
    return codec_tables(tiles.head_shape(head).codec, tiles.shape.head_dim);
}

void decode_composites(const TileDecode& a) {
    const int d = a.shape.head_dim;
    std::vector<float> y(d);
    for (int i = 0; i < a.n; ++i) {
        composite_decode_slot(a.shape, a.tile, static_cast<int>(a.cells[i] % kTileKeys), y);
        if (a.turns && a.offsets[i]) {
            const float *offset = a.offsets[i] + a.offset_at, *turn = a.turns + static_cast<std::size_t>(i) * 2 * d;
            for (int j = 0; j < d; ++j) y[j] += offset[j] * turn[j] + offset[d + j] * turn[d + j];
        }
        for (int j = 0; j < d; ++j) {
            if (a.unscale) y[j] *= a.unscale[j];
            if (a.x) a.x[i * a.stride + j] = y[j];
            if (a.halves) a.halves[i * a.stride + j] = to_half(y[j]);
        }
    }
}

bool turn_composites(const Kernels& k, const TileTurn& a) {
    const int d = a.shape.head_dim, pairs = a.pairs.n_dims / 2;
    std::vector<float> x(static_cast<std::size_t>(a.n) * d);
    for (int i = 0; i < a.n; ++i) {
        const auto y = std::span(x).subspan(static_cast<std::size_t>(i) * d, d);
        composite_decode_slot(a.shape, a.tile, static_cast<int>(a.cells[i] % kTileKeys), y);
        for (int j = 0; j < pairs; ++j) {
            const int at = a.pairs.first + (a.pairs.adjacent ? 2 * j : j), other = at + (a.pairs.adjacent ? 1 : pairs);
            const float u = y[at], v = y[other], c = a.tables[i][2 * j], s = a.tables[i][2 * j + 1];
            y[at] = u * c - v * s, y[other] = u * s + v * c;
        }
    }
    std::vector<std::int64_t> slots;
    for (int i = 0; i < a.n; ++i) slots.push_back(a.cells[i] % kTileKeys);
    EncodeArgs e;
    e.shape = a.shape, e.tiles = a.tile, e.x = x.data(), e.x_stride = d, e.cells = slots.data(), e.n = a.n, e.norm_mode = a.norm_mode;
    return encode(k, e);
}

}  // namespace

void get_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, std::uint8_t* rows,
              std::size_t stride) {
    check_row_form(tiles);
    const std::vector<std::size_t> at = row_offsets(tiles);
    for_each_run(executor, cells, tiles.n_head,
                 [&](const Run& run, int h) { k.get_rows(tile_rows(tiles, cells, run, h, rows + at[h], stride), tables_of(tiles, h)); });
}

void set_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, const std::uint8_t* rows,
              std::size_t stride) {
    check_row_form(tiles);
    const std::vector<std::size_t> at = row_offsets(tiles);
    auto* in = const_cast<std::uint8_t*>(rows);  // of the struct that both directions share: read only
    for_each_run(executor, cells, tiles.n_head,
                 [&](const Run& run, int h) { k.set_rows(tile_rows(tiles, cells, run, h, in + at[h], stride), tables_of(tiles, h)); });
}

void decode_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells,
                 const DecodedRows& out) {
    const std::size_t d = tiles.shape.head_dim;
    for_each_run(executor, cells, tiles.n_head, [&](const Run& run, int h) {
        TileDecode a;
        const TileRows slots = tile_rows(tiles, cells, run, h, nullptr, 0);
        a.shape = slots.shape, a.tile = slots.tile, a.cells = slots.cells, a.n = slots.n, a.stride = out.stride;
        if (out.x) a.x = out.x + run.first * out.stride + h * d;
        if (out.halves) a.halves = out.halves + run.first * out.stride + h * d;
        if (out.turns) a.turns = out.turns + run.first * 2 * d, a.offsets = out.offsets + run.first, a.offset_at = h * 2 * d;
        if (out.unscale) a.unscale = out.unscale + h * d;
        is_composite(a.shape.codec) ? decode_composites(a) : k.decode_rows(a, tables_of(tiles, h));
    });
}

bool rotate_rows(const Kernels& k, Executor& executor, const StreamTiles& tiles, std::span<const std::int64_t> cells, const PairTurn& pairs,
                 std::span<const float* const> tables, NormMode mode) {
    std::atomic<bool> finite = true;
    for_each_run(executor, cells, tiles.n_head, [&](const Run& run, int h) {
        const TileRows slots = tile_rows(tiles, cells, run, h, nullptr, 0);
        const TileTurn a{slots.shape, slots.tile, slots.cells, slots.n, pairs, tables.data() + run.first, mode};
        if (!(is_composite(a.shape.codec) ? turn_composites(k, a) : k.rotate_rows(a, tables_of(tiles, h)))) finite = false;
    });
    return finite;
}

}  // namespace turboquant
