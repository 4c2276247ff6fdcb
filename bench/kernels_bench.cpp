// Micro-benchmarks of the kernels, per codec and instruction-set level, on one thread: one decode step (ms), prefill (ms), encoding (ns per
// vector). 32 query heads, 8 KV heads, head size 128. Counters: bytes/s are those of the compressed cache.
#include <benchmark/benchmark.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "turboquant/attention/turns.h"
#include "turboquant/cli/thread_team.h"
#include "turboquant/codec/random.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/kernels/rows.h"

namespace turboquant {
namespace {

constexpr int kHeads = 32, kHeadsKv = 8, kDim = 128;

std::vector<float> normals(std::size_t n) {
    SplitMix64 random(7);
    std::vector<float> x(n);
    for (float& v : x) v = static_cast<float>(random.normal());
    return x;
}

// Tiles of all KV heads, [tile][head], filled with the same 64 random vectors.
std::vector<std::uint8_t> filled_tiles(TileShape shape, int n_kv) {
    const std::vector<float> x = normals(static_cast<std::size_t>(kTileKeys) * shape.head_dim);
    std::vector<std::uint8_t> tile(tile_bytes(shape)), tiles;
    std::vector<std::int64_t> cells(kTileKeys);
    for (int j = 0; j < kTileKeys; ++j) cells[j] = j;
    EncodeArgs a;
    a.shape = shape, a.tiles = tile.data(), a.tile_stride = tile.size(), a.x = x.data(), a.x_stride = shape.head_dim,
    a.cells = cells.data(), a.n = kTileKeys;
    encode(kernels(), a);
    for (int i = 0; i < n_kv / kTileKeys * kHeadsKv; ++i) tiles.insert(tiles.end(), tile.begin(), tile.end());
    return tiles;
}

struct Options {
    int n_tokens = 1;
    bool causal = false;
    int n_freq = 0;
    bool scattered = false;  // positions of the cells, else successive
};

void attention_step(benchmark::State& state, SimdLevel level, CodecId codec, int n_kv, Options options) {
    const TileShape key{codec, Side::key, kDim}, value{codec, Side::value, kDim};
    const std::vector<std::uint8_t> k = filled_tiles(key, n_kv), v = filled_tiles(value, n_kv);
    const std::vector<float> q = normals(static_cast<std::size_t>(options.n_tokens) * kHeads * kDim);
    std::vector<float> out(q.size());
    AttentionArgs a;
    a.n_head = kHeads, a.n_head_kv = kHeadsKv, a.n_tokens = options.n_tokens, a.n_kv = n_kv;
    a.q = q.data(), a.out = out.data();
    a.q_token_stride = a.out_token_stride = kHeads * kDim, a.q_head_stride = a.out_head_stride = kDim;
    a.k = {key, k.data(), tile_bytes(key), kHeadsKv * tile_bytes(key)};
    a.v = {value, v.data(), tile_bytes(value), kHeadsKv * tile_bytes(value)};
    a.v_dim_out = kDim;
    a.scale = 1 / std::sqrt(static_cast<float>(kDim));
    std::vector<std::uint16_t> mask;
    if (options.causal) {
        for (int t = 0; t < options.n_tokens; ++t)
            for (int j = 0; j < n_kv; ++j) mask.push_back(j <= n_kv - options.n_tokens + t ? 0 : kMaskHidden);
        a.mask = mask.data(), a.mask_token_stride = n_kv;
    }
    const std::vector<float> q_term = normals(static_cast<std::size_t>(options.n_tokens) * kHeads * 2 * options.n_freq);
    std::vector<float> turns;
    std::vector<std::int32_t> positions;
    if (options.n_freq) {
        turns = make_turns(std::vector<double>(options.n_freq, 0.1));
        for (int j = 0; j < n_kv; ++j) positions.push_back(options.scattered ? (j * 5) % n_kv : j);
        a.term = {options.n_freq, q_term.data(), turns.data(), positions.data()};
    }
    const Kernels& kn = kernels(level);
    const AttentionPlan plan = plan_attention(a, 1);
    std::vector<std::uint8_t> memory(plan.workspace_bytes + 64);
    auto* workspace = reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
    for (auto _ : state) {
        run_attention(kn, plan, a, workspace, 0);
        merge_attention(kn, plan, a, workspace, 0);
        benchmark::DoNotOptimize(out.data());
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * (k.size() + v.size())));
}

void encode_batch(benchmark::State& state, SimdLevel level, CodecId codec, Side side, int n) {
    const TileShape shape{codec, side, kDim};
    std::vector<std::uint8_t> tiles((n + kTileKeys - 1) / kTileKeys * tile_bytes(shape));
    const std::vector<float> x = normals(static_cast<std::size_t>(n) * kDim);
    std::vector<std::int64_t> cells(n);
    for (int j = 0; j < n; ++j) cells[j] = j;
    EncodeArgs a;
    a.shape = shape, a.tiles = tiles.data(), a.tile_stride = tile_bytes(shape), a.x = x.data(), a.x_stride = kDim, a.cells = cells.data(),
    a.n = n;
    const Kernels& k = kernels(level);
    for (auto _ : state) {
        encode(k, a);
        benchmark::DoNotOptimize(tiles.data());
    }
    state.counters["per_vector"] =
        benchmark::Counter(static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

enum class Move { save, restore, shift };

/// Rows of a whole stream. bytes_per_second counts nominal rows: fp16.
void move_rows(benchmark::State& state, SimdLevel level, CodecId codec, Side side, Move move, int threads) {
    constexpr int kCells = 4096;
    const TileShape shape{codec, side, kDim};
    std::vector<std::uint8_t> memory = filled_tiles(shape, kCells);
    const StreamTiles tiles({shape, memory.data(), tile_bytes(shape), kHeadsKv * tile_bytes(shape)}, memory.data(), kHeadsKv);
    const std::size_t row = 2 * kHeadsKv * kDim;
    std::vector<std::uint8_t> rows(kCells * row);
    std::vector<std::int64_t> cells(kCells);
    for (int i = 0; i < kCells; ++i) cells[i] = i;
    std::vector<float> table;
    for (int i = 0; i < kDim / 2; ++i) table.insert(table.end(), {std::cos(0.1f * i), std::sin(0.1f * i)});
    const std::vector<const float*> tables(kCells, table.data());
    const Kernels& k = kernels(level);
    cli::ThreadTeam executor(threads);
    get_rows(k, executor, tiles, cells, rows.data(), row);
    for (auto _ : state) {
        if (move == Move::save) get_rows(k, executor, tiles, cells, rows.data(), row);
        if (move == Move::restore) set_rows(k, executor, tiles, cells, rows.data(), row);
        if (move == Move::shift) rotate_rows(k, executor, tiles, cells, {0, kDim, true}, tables, NormMode::corrected);
        benchmark::DoNotOptimize(rows.data());
    }
    state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations()) * kCells * row);
    state.counters["per_vector"] =
        benchmark::Counter(kCells * kHeadsKv, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void register_all() {
    for (const SimdLevel level : available_simd_levels())
        for (const CodecInfo& codec : kCodecs) {
            const std::string tail = std::string("/").append(codec.name).append("/").append(simd_level_name(level));
            const auto add = [&](const std::string& name, auto f) { benchmark::RegisterBenchmark((name + tail).c_str(), f)->MinTime(0.2); };
            for (const int n_kv : {4096, 32768})
                add("decode/" + std::to_string(n_kv), [=](benchmark::State& s) { attention_step(s, level, codec.id, n_kv, {}); });
            add("decode_term/4096", [=](benchmark::State& s) { attention_step(s, level, codec.id, 4096, {.n_freq = 64}); });
            add("decode_term_scattered/4096",
                [=](benchmark::State& s) { attention_step(s, level, codec.id, 4096, {.n_freq = 64, .scattered = true}); });
            add("prefill512/4096",
                [=](benchmark::State& s) { attention_step(s, level, codec.id, 4096, {.n_tokens = 512, .causal = true}); });
            add("encode_key", [=](benchmark::State& s) { encode_batch(s, level, codec.id, Side::key, 512); });
            add("encode_value", [=](benchmark::State& s) { encode_batch(s, level, codec.id, Side::value, 512); });
            if (is_composite(codec.id)) continue;
            for (const auto& [name, side, move] : {std::tuple("save", Side::key, Move::save),
                                                   {"restore", Side::key, Move::restore},
                                                   {"shift", Side::key, Move::shift},
                                                   {"save_value", Side::value, Move::save},
                                                   {"restore_value", Side::value, Move::restore}})
                for (const int threads : {1, 2}) {
                    const Move m = move;
                    const Side kept = side;
                    benchmark::RegisterBenchmark((std::string(name) + "/" + std::to_string(threads) + tail).c_str(),
                                                 [=](benchmark::State& s) { move_rows(s, level, codec.id, kept, m, threads); })
                        ->MinTime(0.2)
                        ->UseRealTime();
                }
        }
}

}  // namespace
}  // namespace turboquant

int main(int argc, char** argv) {
    turboquant::register_all();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
}
