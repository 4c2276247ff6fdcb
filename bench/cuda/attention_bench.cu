// Attention on the GPU, timed: CUDA-graph replays, medians, inputs larger than L2, bytes and share of the card's read bandwidth.
// One line per case, as a table or, with --json, for scripts/bench-gpu.
// usage: cuda_bench [--json] [--quick] [--only BATCHxCELLS] [--tokens N] [--kinds decode,term,heads,tokens,window,prefill,prefill-term,all-cells] [--formats turbo4,...]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/fragment_order.h"

namespace turboquant::cuda {
namespace {

void must(cudaError_t e, const char* what) {
    if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}
void must(const Status& s) {
    if (!s.ok()) throw std::runtime_error(s.message());
}

__device__ uint32_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull, x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(x >> 31);
}
// Random codes; fp16 scales in [.5, 2).
__global__ void fill_tiles(uint32_t* words, size_t n, int tile_words, int code_words, uint64_t seed) {
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
        const uint32_t r = mixed(seed + i * 0x9e3779b97f4a7c15ull);
        words[i] = static_cast<int>(i % tile_words) < code_words ? r : (0x38003800u | (r & 0x07ff07ffu));
    }
}
// fp16 values for raw tiles: about N(0, 1).
__global__ void fill_halves(uint32_t* words, size_t n, uint64_t seed) {
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
        const uint32_t r = mixed(seed + i * 0x9e3779b97f4a7c15ull);
        words[i] = 0x38003800u | (r & 0x87ff87ffu);
    }
}
__global__ void fill_floats(float* x, size_t n, float size, uint64_t seed) {
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
        float sum = 0;
        for (int k = 0; k < 4; ++k) sum += mixed(seed + (i * 4 + k) * 0x9e3779b97f4a7c15ull) * (1.f / 4294967296.f) - .5f;
        x[i] = size * 1.7320508f * sum;
    }
}
__global__ void read_all(const uint4* x, size_t n, uint32_t* out) {
    uint32_t r = 0;
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) {
        uint4 v;
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(x + i));
        r ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (r == 0x12345678u) *out = r;
}

struct Case {
    std::string kind, name;
    CodecId k, v;
    int batch, n_kv, head_dim = 128, n_head = 32, n_head_kv = 8, n_tokens = 1;
    bool term = false, causal = true;
    int exact = 0;
};

class Bench {
  public:
    Bench() {
        must(query_device(0, device));
        must(cudaStreamCreate(&stream), "stream");
        pool_bytes = std::min<size_t>(size_t{4} << 30, device.memory_bytes / 4);
        must(cudaMalloc(&pool, pool_bytes), "memory");
        must(cudaMalloc(&small, kSmall), "memory");
        must(cudaMalloc(&exact_pool, kExact), "memory");
        must(cudaMalloc(&workspace, kWorkspace), "memory");
        fill_halves<<<2048, 256, 0, stream>>>(static_cast<uint32_t*>(exact_pool), kExact / 4, 99);
    }

    double read_bandwidth() {
        const double us = time(1, [&](int) { read_all<<<device.n_sm * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(pool), pool_bytes / 16, static_cast<uint32_t*>(small)); }, 8);
        return static_cast<double>(pool_bytes) / us * 1e-6;
    }

    // Median microseconds of one call; `sets` different inputs in turn.
    double time(int sets, const std::function<void(int)>& call, int launches) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        cudaEvent_t a, b;
        must(cudaEventCreate(&a), "event"), must(cudaEventCreate(&b), "event");
        must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        for (int i = 0; i < launches; ++i) call(i % sets);
        must(cudaStreamEndCapture(stream, &graph), "capture");
        must(cudaGraphInstantiate(&exec, graph, 0), "graph");
        std::vector<float> times;
        for (int r = 0; r < 8; ++r) {
            float ms = 0;
            must(cudaEventRecord(a, stream), "event"), must(cudaGraphLaunch(exec, stream), "graph"), must(cudaEventRecord(b, stream), "event");
            must(cudaEventSynchronize(b), "graph"), must(cudaEventElapsedTime(&ms, a, b), "event");
            if (r > 1) times.push_back(ms);
        }
        must(cudaGraphExecDestroy(exec), "graph"), must(cudaGraphDestroy(graph), "graph"), must(cudaEventDestroy(a), "event"), must(cudaEventDestroy(b), "event");
        std::sort(times.begin(), times.end());
        return static_cast<double>(times[times.size() / 2]) * 1e3 / launches;
    }

    void fill(uint8_t* at, CodecId codec, int head_dim, size_t bytes, uint64_t seed) {
        if (codec == CodecId::raw) {
            fill_halves<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(at), bytes / 4, seed);
            return;
        }
        const TileShape s{codec, Side::key, head_dim};
        fill_tiles<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(at), bytes / 4, static_cast<int>(tile_bytes(s) / 4), static_cast<int>(tile_code_bytes(s) / 4), seed);
    }

    struct Result {
        double us, bytes;
        int splits;
    };
    Result run(const Case& c) {
        const size_t tiles = (c.n_kv + 63) / 64, kt = tile_bytes({c.k, Side::key, c.head_dim}), vt = tile_bytes({c.v, Side::value, c.head_dim});
        const size_t kb = c.batch * c.n_head_kv * tiles * kt, vb = c.batch * c.n_head_kv * tiles * vt, bytes = kb + vb;
        if (bytes > pool_bytes) throw std::runtime_error("too large");
        const int sets = static_cast<int>(std::clamp<size_t>((size_t{300} << 20) / bytes + 1, 1, pool_bytes / bytes));
        for (int s = 0; s < sets; ++s)
            fill(pool + s * bytes, c.k, c.head_dim, kb, 1 + s), fill(pool + s * bytes + kb, c.v, c.head_dim, vb, 1000 + s);
        size_t at = 0;
        const auto take = [&](size_t n) {
            uint8_t* p = static_cast<uint8_t*>(small) + at;
            at += (n + 255) / 256 * 256;
            if (at > kSmall) throw std::runtime_error("too large");
            return p;
        };
        AttentionTables tables;
        must(upload_attention_tables(tables, c.head_dim, take(attention_table_bytes(c.head_dim)), stream));
        const size_t rows = size_t(c.n_tokens) * c.n_head * c.head_dim;
        auto* q = reinterpret_cast<float*>(take(c.batch * rows * 4));
        auto* out = reinterpret_cast<float*>(take(c.batch * rows * 4));
        fill_floats<<<1024, 256, 0, stream>>>(q, c.batch * rows, 12, 7);

        std::vector<int> lengths(c.batch, c.n_kv);
        AttentionPlan plan;
        const CodecId sides[] = {c.k, c.v};
        must(plan_attention(device, {c.head_dim, c.n_head, c.n_head_kv, c.n_tokens, lengths, c.exact > 0, false, sides, c.term}, plan));
        if (plan.workspace_bytes > kWorkspace) throw std::runtime_error("workspace too large");
        must(prepare_workspace(plan, workspace, stream));
        AttentionArgs a;
        a.tables = &tables, a.q = q, a.out = out;
        a.q_seq_stride = a.out_seq_stride = rows, a.q_token_stride = a.out_token_stride = size_t(c.n_head) * c.head_dim;
        a.q_head_stride = a.out_head_stride = c.head_dim;
        a.k = {nullptr, c.n_head_kv * tiles * kt, tiles * kt, kt, c.k}, a.v = {nullptr, c.n_head_kv * tiles * vt, tiles * vt, vt, c.v};
        a.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
        a.causal = c.n_tokens > 1 && c.causal;
        if (c.exact) {
            const size_t et = tile_bytes({CodecId::raw, Side::key, c.head_dim}), n = (c.exact + 63) / 64;
            a.exact_k = {static_cast<uint8_t*>(exact_pool), c.n_head_kv * n * et, n * et, et, CodecId::raw};
            a.exact_v = a.exact_k, a.exact_v.tiles += kExact / 2;
            if (c.batch * c.n_head_kv * n * et > kExact / 2) throw std::runtime_error("too large");
            std::vector<int> count(c.batch, c.exact);
            auto* d = take(count.size() * 4);
            must(cudaMemcpyAsync(d, count.data(), count.size() * 4, cudaMemcpyHostToDevice, stream), "copy");
            a.exact_n = reinterpret_cast<int*>(d);
        }
        if (c.term) {
            const int n = c.head_dim / 2;
            std::vector<double> w;
            for (int i = 0; i < n; ++i) w.push_back(std::pow(10000.0, -static_cast<double>(i) / n));
            const auto put = [&](const void* data, size_t size) {
                auto* d = take(size);
                must(cudaMemcpyAsync(d, data, size, cudaMemcpyHostToDevice, stream), "copy");
                must(cudaStreamSynchronize(stream), "copy");
                return d;
            };
            const std::vector<float> turns = make_term_turns(w, c.n_kv + 64);
            const std::vector<uint32_t> panel = make_term_panel(w);
            std::vector<int> pos(c.n_kv);
            for (int i = 0; i < c.n_kv; ++i) pos[i] = i + 5;
            const size_t term_rows = size_t(c.n_tokens) * c.n_head * 2 * n;
            auto* q_term = reinterpret_cast<float*>(take(c.batch * term_rows * 4));
            fill_floats<<<1024, 256, 0, stream>>>(q_term, c.batch * term_rows, 3 / (std::sqrt(static_cast<float>(n)) * a.scale), 70);
            a.term.n_freq = n, a.term.q_term = q_term, a.term.q_seq_stride = term_rows;
            a.term.turns = reinterpret_cast<float*>(put(turns.data(), turns.size() * 4)), a.term.panel = put(panel.data(), panel.size() * 4);
            auto* offset = reinterpret_cast<float*>(take(size_t(c.n_head_kv) * 2 * c.head_dim * 4));
            fill_floats<<<1024, 256, 0, stream>>>(offset, size_t(c.n_head_kv) * 2 * c.head_dim, .3f, 71);
            std::vector<std::uint8_t> dim_freq(c.head_dim);
            for (int i = 0; i < c.head_dim; ++i) dim_freq[i] = static_cast<std::uint8_t>(i % n);
            a.term.offset = offset, a.term.dim_freq = put(dim_freq.data(), dim_freq.size());
            a.term.cell_pos = reinterpret_cast<int*>(put(pos.data(), pos.size() * 4));
            auto* tile_pos = reinterpret_cast<int*>(take(tiles * 4));
            a.term.tile_pos = tile_pos;  // stride 0: all sequences alike
            must(summarize_positions(a.term, 1, c.n_kv, nullptr, tile_pos, stream));
        }
        must(cudaStreamSynchronize(stream), "inputs");
        const double per_launch = static_cast<double>(bytes) * std::max(1, c.n_tokens / 8);
        const int launches = std::max(sets, static_cast<int>(std::min(200.0, 2e9 / per_launch)) / sets * sets);
        const double us = time(sets, [&](int s) {
            a.k.tiles = pool + s * bytes, a.v.tiles = a.k.tiles + kb;
            must(run_attention(plan, a, workspace, stream));
        }, c.n_tokens > 8 ? sets : launches);
        return {us, static_cast<double>(bytes), plan.prefill.n_splits ? plan.prefill.n_splits : plan.most_splits};
    }

    Device device;
    cudaStream_t stream = nullptr;

  private:
    static constexpr size_t kSmall = size_t{512} << 20, kWorkspace = size_t{1} << 30, kExact = size_t{256} << 20;
    uint8_t* pool = nullptr;
    void *small = nullptr, *workspace = nullptr, *exact_pool = nullptr;
    size_t pool_bytes = 0;
};

std::vector<Case> cases(const std::string& kinds, const std::vector<CodecId>& formats, bool quick) {
    std::vector<Case> all;
    const auto has = [&](const char* kind) { return kinds.empty() || ("," + kinds + ",").find("," + std::string(kind) + ",") != std::string::npos; };
    constexpr int shapes[][2] = {{1, 4096}, {1, 32768}, {1, 131072}, {8, 32768}, {32, 32768}};
    for (const bool term : {false, true})
        if (has(term ? "term" : "decode"))
            for (const CodecId f : formats)
                for (const auto& s : shapes)
                    if (!quick || s[0] == 32 || s[1] == 131072 || s[1] == 4096) {
                        Case c{term ? "term" : "decode", std::string(codec_info(f).name), f, f, s[0], s[1]};
                        c.term = term;
                        all.push_back(c);
                    }
    if (has("mixed")) all.push_back({"mixed", "turbo4/turbo3", CodecId::turbo4, CodecId::turbo3, 32, 32768});
    if (has("heads"))
        for (const CodecId f : {CodecId::turbo4, CodecId::turbo3, CodecId::tcq3})
            for (const auto& [d, group] : {std::pair{64, 4}, {256, 4}, {128, 1}, {128, 2}, {128, 7}, {128, 8}, {96, 4}, {80, 4}, {112, 4}, {192, 4}, {512, 4}}) {
                Case c{"heads", std::string(codec_info(f).name), f, f, 32, 32768};
                c.head_dim = d, c.n_head_kv = d >= 256 ? 4 : 8, c.n_head = group * c.n_head_kv;
                if (d == 512) c.batch = 16;
                all.push_back(c);
            }
    if (has("tokens"))
        for (const CodecId f : {CodecId::turbo4, CodecId::turbo3, CodecId::tcq3})
            for (const int tokens : {1, 2, 4, 8}) {
                Case c{"tokens", std::string(codec_info(f).name), f, f, 8, 32768};
                c.n_tokens = tokens;
                all.push_back(c);
            }
    if (has("window"))
        for (const CodecId f : {CodecId::turbo4, CodecId::tcq3})
            for (const auto& s : shapes) {
                Case c{"window", std::string(codec_info(f).name), f, f, s[0], s[1]};
                c.exact = 192;
                all.push_back(c);
            }
    for (const std::string kind : {"prefill", "prefill-term", "all-cells"})
        if (has(kind.c_str()))
            for (const CodecId f : formats)
                for (const int tokens : {32, 128, 512, 2048}) {
                    Case c{kind, std::string(codec_info(f).name), f, f, 1, 32768};
                    c.n_tokens = tokens, c.causal = kind != "all-cells", c.term = kind == "prefill-term";
                    all.push_back(c);
                }
    return all;
}

}  // namespace
}  // namespace turboquant::cuda

int main(int argc, char** argv) try {
    using namespace turboquant;
    using namespace turboquant::cuda;
    std::string kinds;
    std::vector<CodecId> formats{CodecId::turbo4, CodecId::turbo3, CodecId::turbo2, CodecId::tcq4, CodecId::tcq3, CodecId::tcq2};
    bool json = false, quick = false;
    int only_batch = 0, only_kv = 0, only_tokens = 0;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "--json") json = true;
        else if (arg == "--quick") quick = true;
        else if (arg == "--only" && i + 1 < argc) std::sscanf(argv[++i], "%dx%d", &only_batch, &only_kv);
        else if (arg == "--tokens" && i + 1 < argc) only_tokens = std::atoi(argv[++i]);
        else if (arg == "--kinds" && i + 1 < argc) kinds = argv[++i];
        else if (arg == "--formats" && i + 1 < argc) {
            formats.clear();
            std::string list = argv[++i];
            for (std::size_t at = 0; at <= list.size();) {
                const std::size_t end = std::min(list.find(',', at), list.size());
                const auto id = find_codec(list.substr(at, end - at));
                if (!id) throw std::runtime_error("unknown format in --formats");
                formats.push_back(*id), at = end + 1;
            }
        } else throw std::runtime_error("unknown argument " + arg);
    }
    Bench bench;
    const double bandwidth = bench.read_bandwidth();
    if (!json) std::printf("# %s, %d SMs, L2 %zu MB, reads %.2f TB/s\n", bench.device.name.c_str(), bench.device.n_sm, bench.device.l2_bytes >> 20, bandwidth);
    for (const Case& c : cases(kinds, formats, quick)) {
        if (only_batch && (c.batch != only_batch || c.n_kv != only_kv)) continue;
        if (only_tokens && c.n_tokens != only_tokens) continue;
        try {
            const Bench::Result r = bench.run(c);
            if (json)
                std::printf("{\"device\": \"%s\", \"read_tb_per_s\": %.3f, \"kind\": \"%s\", \"format\": \"%s\", \"batch\": %d, \"n_kv\": %d, \"head_dim\": %d, \"n_head\": %d, \"n_head_kv\": %d, \"n_tokens\": %d, \"exact\": %d, \"us\": %.3f, \"tb_per_s\": %.3f}\n",
                            bench.device.name.c_str(), bandwidth, c.kind.c_str(), c.name.c_str(), c.batch, c.n_kv, c.head_dim, c.n_head, c.n_head_kv, c.n_tokens, c.exact, r.us, r.bytes / r.us * 1e-6);
            else
                std::printf("%-12s %-13s %2d x %6d  %2d/%d x %3d  q %4d  %9.1f us  %5.2f TB/s  %3.0f %%  (%d parts)\n", c.kind.c_str(), c.name.c_str(), c.batch, c.n_kv, c.n_head,
                            c.n_head_kv, c.head_dim, c.n_tokens, r.us, r.bytes / r.us * 1e-6, 100 * r.bytes / r.us * 1e-6 / bandwidth, r.splits);
        } catch (const std::exception& e) {
            std::printf("# %s %s %d x %d d %d q %d: %s\n", c.kind.c_str(), c.name.c_str(), c.batch, c.n_kv, c.head_dim, c.n_tokens, e.what());
            cudaGetLastError();
        }
        std::fflush(stdout);
    }
    return 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
}
