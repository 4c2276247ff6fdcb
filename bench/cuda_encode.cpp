// Encoding on the GPU: CUDA-graph replays over inputs larger than L2, medians; bytes and share of the card's copy speed.
//   bench_cuda_encode [format ...]
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "turboquant/codec/quantizer.h"
#include "turboquant/codec/random.h"
#include "turboquant/cuda/encode.h"
#include "turboquant/cuda/fragment_order.h"

namespace {

using namespace turboquant;
using namespace turboquant::cuda;

constexpr int kHeads = 8, kRounds = 7;

void ok(cudaError_t e) {
    if (e == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(e));
    std::exit(1);
}
void ok(const Status& s) {
    if (s.ok()) return;
    std::fprintf(stderr, "%s\n", s.message().c_str());
    std::exit(1);
}
template <class T>
T* device(std::size_t n) {
    void* p;
    ok(cudaMalloc(&p, n * sizeof(T)));
    return static_cast<T*>(p);
}

/// Median time of one replay of what `record` puts on a stream, in us.
template <class F>
double replay_us(F record) {
    cudaStream_t s;
    ok(cudaStreamCreate(&s));
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    ok(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    record(s);
    ok(cudaStreamEndCapture(s, &graph));
    ok(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    ok(cudaEventCreate(&a));
    ok(cudaEventCreate(&b));
    std::vector<double> times;
    for (int i = 0; i < kRounds + 2; ++i) {
        ok(cudaEventRecord(a, s));
        ok(cudaGraphLaunch(exec, s));
        ok(cudaEventRecord(b, s));
        ok(cudaEventSynchronize(b));
        float ms;
        ok(cudaEventElapsedTime(&ms, a, b));
        if (i >= 2) times.push_back(1e3 * ms);
    }
    std::ranges::sort(times);
    ok(cudaGraphExecDestroy(exec));
    ok(cudaGraphDestroy(graph));
    ok(cudaStreamDestroy(s));
    return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> only(argv + 1, argv + argc);
    Device dev;
    ok(query_device(0, dev));
    constexpr int d = 128, kTokens = 16384, kBuffers = 6;
    constexpr std::size_t kValues = static_cast<std::size_t>(kTokens) * kHeads * d;
    std::vector<float> host(kValues);
    SplitMix64 random(1);
    std::vector<float> some(1 << 20);
    for (float& f : some) f = static_cast<float>(random.normal());
    for (std::size_t i = 0; i < kValues; ++i) host[i] = some[(i * 7 + i / some.size() * 13) % some.size()];
    std::vector<std::uint16_t> host_half(kValues);
    for (std::size_t i = 0; i < kValues; ++i) host_half[i] = to_half(host[i]);
    std::vector<float*> x;
    std::vector<std::uint16_t*> halves;
    std::vector<std::uint8_t*> out;
    const std::size_t out_bytes = static_cast<std::size_t>(kTokens / 64) * kHeads * 64 * d * 2;
    for (int i = 0; i < kBuffers; ++i) {
        x.push_back(device<float>(kValues)), halves.push_back(device<std::uint16_t>(kValues)),
            out.push_back(device<std::uint8_t>(out_bytes));
        ok(cudaMemcpy(x[i], host.data(), kValues * 4, cudaMemcpyHostToDevice));
        ok(cudaMemcpy(halves[i], host_half.data(), kValues * 2, cudaMemcpyHostToDevice));
        ok(cudaMemset(out[i], 0, out_bytes));
    }
    std::vector<std::int64_t> cells(kTokens);
    for (int i = 0; i < kTokens; ++i) cells[i] = i;
    auto* d_cells = device<std::int64_t>(kTokens);
    ok(cudaMemcpy(d_cells, cells.data(), kTokens * 8, cudaMemcpyHostToDevice));
    std::vector<std::int32_t> ids(kTokens, 0);
    auto* d_ids = device<std::int32_t>(kTokens);
    ok(cudaMemcpy(d_ids, ids.data(), kTokens * 4, cudaMemcpyHostToDevice));
    auto* turns = device<float>(static_cast<std::size_t>(kTokens) * 2 * d);
    ok(cudaMemcpy(turns, host.data(), static_cast<std::size_t>(kTokens) * 2 * d * 4, cudaMemcpyHostToDevice));
    auto* offsets = device<float>(kHeads * 2 * d);
    ok(cudaMemcpy(offsets, host.data(), kHeads * 2 * d * 4, cudaMemcpyHostToDevice));
    auto* bad = device<std::uint32_t>(1);

    const double copy_us = replay_us([&](cudaStream_t s) {
        for (int i = 0; i + 1 < kBuffers; i += 2) ok(cudaMemcpyAsync(x[i + 1], x[i], kValues * 4, cudaMemcpyDeviceToDevice, s));
    });
    const double copy = kBuffers / 2 * 2.0 * kValues * 4 / copy_us * 1e-6;
    std::printf("%s, copy %.2f TB/s (read + written); %d heads, d = %d, batches of %d tokens\n", dev.name.c_str(), copy, kHeads, d,
                kTokens);
    std::printf("%-8s %-6s %-4s %-7s %10s %10s %14s %8s %12s %12s %12s\n", "format", "side", "in", "", "us", "G vec/s", "fp16-eq GB/s",
                "of copy", "us, 1 token", "us, 32", "us, 512");
    for (const CodecInfo& c : kCodecs) {
        if (!has_fragment_order(c.id)) continue;
        if (!only.empty() && std::ranges::find(only, c.name) == only.end()) continue;
        for (const Side side : {Side::key, Side::value}) {
            const TileShape shape{c.id, side, d};
            std::vector<EncodePlan> plans(kBuffers);
            for (int i = 0; i < kBuffers; ++i) {
                const TileView view{shape, out[i], tile_bytes(shape) * (kTokens / 64), tile_bytes(shape), nullptr};
                ok(plan_encode(view, kHeads, NormMode::corrected, dev, device<std::uint8_t>(encode_plan_bytes(view, kHeads)), nullptr,
                               plans[i]));
            }
            for (int kind = 0; kind < (side == Side::key ? 3 : 2); ++kind) {
                const auto args = [&](int i, int n) {
                    EncodeArgs a;
                    a.x = kind == 1 ? static_cast<const void*>(halves[i]) : x[i], a.x_is_half = kind == 1;
                    a.token_stride = kHeads * d, a.head_stride = d, a.cells = d_cells, a.n = n, a.not_finite = bad;
                    if (kind == 2) a.turns = turns, a.offsets = offsets, a.offset_ids = d_ids, a.offset_stride = kHeads * 2 * d;
                    return a;
                };
                const double us = replay_us([&](cudaStream_t s) {
                                      for (int i = 0; i < kBuffers; ++i) ok(encode(plans[i], args(i, kTokens), s));
                                  }) /
                                  kBuffers;
                const auto small = [&](int n) {
                    return replay_us([&](cudaStream_t s) {
                               for (int i = 0; i < 60; ++i) ok(encode(plans[i % kBuffers], args(i % kBuffers, n), s));
                           }) /
                           60;
                };
                const double vectors = static_cast<double>(kTokens) * kHeads;
                const double bytes = kValues * (kind == 1 ? 2.0 : 4.0) + static_cast<double>(tile_bytes(shape)) / 64 * vectors;
                std::printf("%-8s %-6s %-4s %-7s %10.1f %10.3f %14.1f %7.0f%% %12.2f %12.2f %12.2f\n", std::string(c.name).c_str(),
                            side == Side::key ? "key" : "value", kind == 1 ? "f16" : "f32", kind == 2 ? "offset" : "", us,
                            vectors / us * 1e-3, kValues * 2 / us * 1e-3, 100 * bytes / us * 1e-6 / copy, small(1), small(32), small(512));
                std::fflush(stdout);
            }
        }
    }
    return 0;
}
