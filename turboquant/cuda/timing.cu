// KernelTimer.
#include "turboquant/cuda/timing.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/encode.h"
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

// Takes the place of other code: 16 K instructions in a row, none of which the compiler can leave out or loop over.
template <int n>
__device__ __forceinline__ float long_way(float x, float y) {
    if constexpr (n == 1) {
        return fmaf(x, y, 1.f);
    } else {
        return long_way<n / 2>(long_way<n / 2>(x, y), y + n);
    }
}
__global__ void other_code(float* out, float y) {
    const float x = long_way<8192>(static_cast<float>(threadIdx.x), y);
    if (x == 1.2345f) *out = x;
}

/// Places in a piece of memory, one after the other.
class Place {
  public:
    Place(void* memory, size_t size) : memory_(static_cast<uint8_t*>(memory)), size_(size) {}
    uint8_t* take(size_t n) {
        uint8_t* p = memory_ + at_;
        at_ += (n + 255) / 256 * 256;
        if (at_ > size_) throw std::runtime_error("too large for this GPU's memory");
        return p;
    }
    uint8_t* put(const void* data, size_t n, cudaStream_t stream) {
        uint8_t* p = take(n);
        must(cudaMemcpyAsync(p, data, n, cudaMemcpyHostToDevice, stream), "copy");
        must(cudaStreamSynchronize(stream), "copy");
        return p;
    }

  private:
    uint8_t* memory_;
    size_t size_, at_ = 0;
};

}  // namespace

struct KernelTimer::State {
    explicit State(int index) {
        must(query_device(index, device));
        must(cudaSetDevice(index), "device");
        must(cudaStreamCreate(&stream), "stream");
        pool_bytes = std::min<size_t>(size_t{4} << 30, device.memory_bytes / 4);
        must(cudaMalloc(&pool, pool_bytes), "memory");
        must(cudaMalloc(&small, kSmall), "memory");
        must(cudaMalloc(&exact_pool, kExact), "memory");
        must(cudaMalloc(&workspace, kWorkspace), "memory");
        fill_halves<<<2048, 256, 0, stream>>>(static_cast<uint32_t*>(exact_pool), kExact / 4, 99);
    }
    ~State() {
        for (void* p : {static_cast<void*>(pool), small, exact_pool, workspace}) cudaFree(p);
        cudaStreamDestroy(stream);
    }

    double read_bandwidth() {
        const double us = time(1, [&](int) { read_all<<<device.n_sm * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(pool), pool_bytes / 16, static_cast<uint32_t*>(small)); }, 8);
        return static_cast<double>(pool_bytes) / us * 1e6;
    }

    double copy_bandwidth() {
        const size_t half = pool_bytes / 2;
        const double us = time(1, [&](int) { must(cudaMemcpyAsync(pool + half, pool, half, cudaMemcpyDeviceToDevice, stream), "copy"); }, 8);
        return 2 * static_cast<double>(half) / us * 1e6;
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

    Timing attention(const AttentionCase& c) {
        const size_t tiles = (c.n_kv + 63) / 64, kt = tile_bytes({c.k, Side::key, c.head_dim}), vt = tile_bytes({c.v, Side::value, c.head_dim});
        const size_t kb = c.batch * c.n_head_kv * tiles * kt, vb = c.batch * c.n_head_kv * tiles * vt, bytes = kb + vb;
        if (bytes > pool_bytes) throw std::runtime_error("attention: too large for this GPU's memory");
        const int sets = static_cast<int>(std::clamp<size_t>((size_t{300} << 20) / bytes + 1, 1, pool_bytes / bytes));
        for (int s = 0; s < sets; ++s)
            fill(pool + s * bytes, c.k, c.head_dim, kb, 1 + s), fill(pool + s * bytes + kb, c.v, c.head_dim, vb, 1000 + s);
        Place place(small, kSmall);
        const auto take = [&](size_t n) { return place.take(n); };
        AttentionTables tables;
        must(upload_attention_tables(tables, c.head_dim, take(attention_table_bytes(c.head_dim)), stream));
        const size_t rows = size_t(c.n_tokens) * c.n_head * c.head_dim;
        auto* q = reinterpret_cast<float*>(take(c.batch * rows * 4));
        auto* out = reinterpret_cast<float*>(take(c.batch * rows * 4));
        fill_floats<<<1024, 256, 0, stream>>>(q, c.batch * rows, 12, 7);

        std::vector<int> lengths(c.batch, c.n_kv);
        AttentionPlan plan;
        const CodecId sides[] = {c.k, c.v};
        const std::span<const CodecId> known = c.by_decode ? std::span<const CodecId>() : sides;
        must(plan_attention(device, {c.head_dim, c.n_head, c.n_head_kv, c.n_tokens, lengths, c.exact > 0, false, known, c.term}, plan));
        if (plan.workspace_bytes > kWorkspace) throw std::runtime_error("attention: its workspace is too large");
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
            if (c.batch * c.n_head_kv * n * et > kExact / 2) throw std::runtime_error("attention: too large for this GPU's memory");
            std::vector<int> count(c.batch, c.exact);
            auto* d = take(count.size() * 4);
            must(cudaMemcpyAsync(d, count.data(), count.size() * 4, cudaMemcpyHostToDevice, stream), "copy");
            a.exact_n = reinterpret_cast<int*>(d);
        }
        if (c.term) {
            const int n = c.head_dim / 2;
            std::vector<double> w;
            for (int i = 0; i < n; ++i) w.push_back(std::pow(10000.0, -static_cast<double>(i) / n));
            const auto put = [&](const void* data, size_t n_bytes) { return place.put(data, n_bytes, stream); };
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
        void* other = static_cast<uint8_t*>(workspace) + kWorkspace / 2;
        if (c.cold && plan.workspace_bytes > kWorkspace / 2) throw std::runtime_error("attention: its workspace is too large");
        if (c.cold) must(prepare_workspace(plan, other, stream));
        const auto run = [&](int s, bool call) {
            a.k.tiles = pool + s * bytes, a.v.tiles = a.k.tiles + kb;
            if (c.cold) {
                read_all<<<device.n_sm * 8, 256, 0, stream>>>(reinterpret_cast<const uint4*>(pool + pool_bytes - kOther), kOther / 16, static_cast<uint32_t*>(small));
                other_code<<<device.n_sm, 128, 0, stream>>>(static_cast<float*>(small), 1.5f);
            }
            if (c.rehearsed) must(run_attention(plan, a, other, stream));
            if (call) must(run_attention(plan, a, workspace, stream));
        };
        const int n = c.n_tokens > 8 ? sets : launches;
        const double us = time(sets, [&](int s) { run(s, true); }, n) - (c.cold ? time(sets, [&](int s) { run(s, false); }, n) : 0);
        return {us, static_cast<double>(bytes), plan.prefill.n_splits ? plan.prefill.n_splits : plan.most_splits};
    }

    Timing encode(const EncodeCase& c) {
        const TileShape shape{c.codec, c.side, c.head_dim};
        const size_t values = size_t(c.n_tokens) * c.n_head * c.head_dim, in = values * (c.half ? 2 : 4), tiles = (c.n_tokens + 63) / 64;
        const size_t of_head = tiles * tile_bytes(shape), out = (c.n_head * of_head + 255) / 256 * 256, each = (in + 255) / 256 * 256 + out;
        if (each > pool_bytes) throw std::runtime_error("encode: too large for this GPU's memory");
        const int sets = static_cast<int>(std::clamp<size_t>((size_t{300} << 20) / each + 1, 1, std::min<size_t>(64, pool_bytes / each)));
        Place place(small, kSmall);
        std::vector<EncodePlan> plans(sets);
        std::vector<const void*> inputs;
        for (int i = 0; i < sets; ++i) {
            uint8_t *x = pool + i * each, *y = x + each - out;
            if (c.half)
                fill_halves<<<2048, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(x), values / 2, 1 + i);
            else
                fill_floats<<<2048, 256, 0, stream>>>(reinterpret_cast<float*>(x), values, 1, 1 + i);
            must(cudaMemsetAsync(y, 0, out, stream), "clear");
            const TileView view{shape, y, of_head, tile_bytes(shape), nullptr};
            must(plan_encode(view, c.n_head, NormMode::corrected, device, place.take(encode_plan_bytes(view, c.n_head)), stream, plans[i]));
            inputs.push_back(x);
        }
        std::vector<std::int64_t> cells(c.n_tokens);
        for (int i = 0; i < c.n_tokens; ++i) cells[i] = i;
        EncodeArgs a;
        a.x_is_half = c.half, a.token_stride = size_t(c.n_head) * c.head_dim, a.head_stride = c.head_dim, a.n = c.n_tokens;
        a.cells = reinterpret_cast<std::int64_t*>(place.put(cells.data(), cells.size() * 8, stream));
        a.not_finite = reinterpret_cast<uint32_t*>(place.take(4));
        if (c.offset) {
            const std::vector<std::int32_t> ids(c.n_tokens, 0);
            const size_t turns = size_t(c.n_tokens) * 2 * c.head_dim, offsets = size_t(c.n_head) * 2 * c.head_dim;
            auto *t = reinterpret_cast<float*>(place.take(turns * 4)), *o = reinterpret_cast<float*>(place.take(offsets * 4));
            fill_floats<<<1024, 256, 0, stream>>>(t, turns, 1, 91), fill_floats<<<64, 256, 0, stream>>>(o, offsets, 1, 92);
            a.turns = t, a.offsets = o, a.offset_stride = offsets;
            a.offset_ids = reinterpret_cast<std::int32_t*>(place.put(ids.data(), ids.size() * 4, stream));
        }
        must(cudaStreamSynchronize(stream), "inputs");
        const int launches = std::max(sets, 60 / sets * sets);
        const double us = time(sets, [&](int i) {
            a.x = inputs[i];
            must(cuda::encode(plans[i], a, stream));
        }, c.n_tokens > 2048 ? sets : launches);
        return {us, static_cast<double>(in) + static_cast<double>(tile_bytes(shape)) / kTileKeys * c.n_tokens * c.n_head, 0};
    }

    Device device;
    cudaStream_t stream = nullptr;

    static constexpr size_t kSmall = size_t{512} << 20, kWorkspace = size_t{1} << 30, kExact = size_t{256} << 20,
                            kOther = size_t{128} << 20;
    uint8_t* pool = nullptr;
    void *small = nullptr, *workspace = nullptr, *exact_pool = nullptr;
    size_t pool_bytes = 0;
};

KernelTimer::KernelTimer(int device) : s_(std::make_unique<State>(device)) {}
KernelTimer::~KernelTimer() = default;
const Device& KernelTimer::device() const { return s_->device; }
double KernelTimer::read_bandwidth() { return s_->read_bandwidth(); }
double KernelTimer::copy_bandwidth() { return s_->copy_bandwidth(); }
Timing KernelTimer::attention(const AttentionCase& c) { return s_->attention(c); }
Timing KernelTimer::encode(const EncodeCase& c) { return s_->encode(c); }

}  // namespace turboquant::cuda
