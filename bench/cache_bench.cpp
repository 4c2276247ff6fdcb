// One layer of a cache as a backend uses it, with the default exact windows beside none: a decode step and prefill of 512 tokens, 32 query
// heads, 8 KV heads, head size 128. The contenders take turns; medians. Times are CPU times of the slowest thread, so that what else runs on the
// machine counts little. `state`: all rows of the layer, default windows, out as llama.cpp saves them and in again; bytes of nominal (fp16)
// rows. usage: build/bin/cache_bench [decode|prefill|state] [seconds]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <numeric>
#include <string_view>
#include <vector>

#include "turboquant/cache/cpu/cpu_store.h"
#include "turboquant/cache/layer_cache.h"
#include "turboquant/cli/thread_team.h"
#include "turboquant/codec/random.h"

namespace turboquant {
namespace {

constexpr int kHeads = 32, kHeadsKv = 8, kDim = 128, kEmbd = kHeadsKv * kDim;

double cpu_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// A team that knows how long its threads worked.
class TimedTeam final : public Executor {
  public:
    explicit TimedTeam(int n) : spent_(n), team_(n) {}
    int n_threads() const override { return team_.n_threads(); }
    /// Seconds since the last call: of the caller's between runs, and of the slowest thread in each.
    double lap() {
        const double now = cpu_seconds(), t = now - lap_ + in_runs_;
        lap_ = now, in_runs_ = 0;
        return t;
    }

  protected:
    void run_parts(int n, void (*part)(void* arg, int ith), void* arg) override {
        const double start = cpu_seconds();
        team_.run(n_threads(), [&](int ith) {
            const double begin = cpu_seconds();
            for (int i = ith; i < n; i += n_threads()) part(arg, i);
            spent_[ith] = cpu_seconds() - begin;
        });
        in_runs_ += *std::max_element(spent_.begin(), spent_.end()) - (cpu_seconds() - start);
    }

  private:
    std::vector<double> spent_;
    double lap_ = 0, in_runs_ = 0;
    cli::ThreadTeam team_;
};

std::vector<float> normals(std::size_t n, std::uint64_t seed) {
    SplitMix64 random(seed);
    std::vector<float> x(n);
    for (float& v : x) v = static_cast<float>(random.normal());
    return x;
}

/// A filled cache of one layer, and queries of its last tokens.
class Layer {
  public:
    Layer(CodecId codec, int n_kv, int n_tokens, WindowSizes windows, TimedTeam& executor)
        : executor_(executor),
          cells_(n_kv, 1),
          layer_(cells_),
          q_(normals(static_cast<std::size_t>(n_tokens) * kHeads * kDim, 3)),
          out_(q_.size()) {
        ctx_.store.executor = &executor;
        for (const Side side : {Side::key, Side::value}) {
            const KvGeometry g{side, codec, default_norm_mode(side), kEmbd, n_kv, 1, kOutlierRatio, windows.resolve(n_kv)};
            memory_.emplace_back(reserved_bytes(g) + 64);
            layer_.set_tensor(g, cpu_store_in(memory_.back().data() + 64 - reinterpret_cast<std::uintptr_t>(memory_.back().data()) % 64));
        }
        for (const Side side : {Side::key, Side::value}) layer_.bind(side, kDim, {});
        rope_.n_dims = kDim, rope_.pairs = RopePairs::split;
        layer_.set_rope(rope_);
        for (int first = 0; first < n_kv; first += kBatch) write(first), layer_.end_batch(ctx_.store);
        mask_.assign(static_cast<std::size_t>(n_tokens) * n_kv, 0);
        for (int t = 0; t < n_tokens; t++)
            std::fill(mask_.begin() + static_cast<std::ptrdiff_t>(t) * n_kv + n_kv - n_tokens + t + 1,
                      mask_.begin() + static_cast<std::ptrdiff_t>(t + 1) * n_kv, kMaskHidden);
        args_.n_head = kHeads, args_.n_head_kv = kHeadsKv, args_.n_tokens = n_tokens, args_.n_kv = n_kv;
        args_.q_token_stride = args_.out_token_stride = kHeads * kDim, args_.q_head_stride = args_.out_head_stride = kDim;
        args_.v_dim_out = kDim, args_.mask_token_stride = n_kv, args_.scale = 1 / std::sqrt(static_cast<float>(kDim));
    }
    /// Attention, and what a step does beside it once per graph, as if a model had n_layers layers.
    double attend(int n_layers) {
        if (args_.n_tokens > 1) {  // attention over a batch ends it: the windows before it and the batch itself are to be exact again
            write(args_.n_kv - 2 * kBatch), layer_.end_batch(ctx_.store);
            write(args_.n_kv - kBatch);
        }
        executor_.lap();
        if (step_++ % n_layers == 0) ctx_.plans.begin_graph();
        const StreamQuery query{q_.data(), out_.data(), mask_.data()};
        if (const char* error = layer_.attend(ctx_, args_, 0, {&query, 1})) std::fprintf(stderr, "%s\n", error), std::exit(1);
        return executor_.lap();
    }
    std::size_t state_bytes() const { return static_cast<std::size_t>(args_.n_kv) * kEmbd * sizeof(std::uint16_t); }  // of a side
    double save(std::vector<std::uint16_t>& state) {
        executor_.lap();
        for (const Side side : {Side::key, Side::value}) layer_.save(ctx_.store, side, 0, state_bytes(), part(state, side));
        return executor_.lap();
    }
    double restore(std::vector<std::uint16_t>& state) {
        executor_.lap();
        for (const Side side : {Side::key, Side::value})
            if (layer_.restore(ctx_.store, side, 0, state_bytes(), part(state, side)) != RestoreResult::ok) std::exit(1);
        return executor_.lap();
    }
    /// All keys by one position, forth and back.
    double shift() {
        const std::vector<std::int32_t> by(args_.n_kv, step_++ % 2 ? -1 : 1);
        executor_.lap();
        layer_.shift(ctx_.store, rope_, by);
        return executor_.lap();
    }

  private:
    static constexpr int kBatch = 512;

    void* part(std::vector<std::uint16_t>& state, Side side) const { return state.data() + (side == Side::key ? 0 : state.size() / 2); }

    void write(int first) {
        std::vector<std::int64_t> rows(kBatch);
        std::vector<std::int32_t> pos(kBatch);
        std::iota(rows.begin(), rows.end(), first), std::iota(pos.begin(), pos.end(), first);
        layer_.write_keys(ctx_, {x_.data(), kEmbd, rows, {}, {}}, pos);
        layer_.write_values(ctx_, {x_.data(), kEmbd, rows, {}, {}});
    }

    TimedTeam& executor_;
    std::vector<std::vector<std::uint8_t>> memory_;
    CellPositions cells_;
    LayerCache layer_;
    RopeParams rope_;
    CacheContext ctx_;
    std::vector<float> x_ = normals(static_cast<std::size_t>(kBatch) * kEmbd, 1), q_, out_;
    std::vector<std::uint16_t> mask_;
    AttentionArgs args_;
    int step_ = 0;
};

double median(std::vector<double> x) {
    std::nth_element(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2), x.end());
    return x[x.size() / 2];
}

void compare(CodecId codec, int n_kv, int n_tokens, int n_threads, double seconds) {
    TimedTeam executor(n_threads);
    Layer with(codec, n_kv, n_tokens, {}, executor), without(codec, n_kv, n_tokens, {0, 0}, executor);
    // A batch is one call: it writes, too. A token's step is all layers of an 8B model, by turns.
    const int n_layers = n_tokens > 1 ? 1 : 32;
    std::vector<double> a, b, ratio;
    for (double spent = 0; spent < seconds || a.size() < 5;) {
        double x = 0, y = 0;
        for (int i = 0; i < n_layers; i++) {
            // In both orders: who is second finds a warmer machine.
            const bool first = (a.size() + static_cast<std::size_t>(i)) % 2 == 0;
            if (first) x += with.attend(n_layers);
            y += without.attend(n_layers);
            if (!first) x += with.attend(n_layers);
        }
        a.push_back(x / n_layers), b.push_back(y / n_layers), ratio.push_back(x / y);
        spent += x + y;
    }
    std::printf("%-8s %6d %6d %8d %9.3f %9.3f %8.1f %%\n", std::string(codec_info(codec).name).c_str(), n_kv, n_tokens, n_threads,
                1e3 * median(b), 1e3 * median(a), 100 * (median(ratio) - 1));
    std::fflush(stdout);
}

void move_state(CodecId codec, int n_kv, int n_threads, double seconds) {
    TimedTeam executor(n_threads);
    Layer layer(codec, n_kv, 1, {}, executor);
    std::vector<std::uint16_t> state(layer.state_bytes());
    std::vector<double> out, in, shift;
    for (double spent = 0; spent < seconds || out.size() < 6; spent += out.back() + in.back() + shift.back())
        out.push_back(layer.save(state)), in.push_back(layer.restore(state)), shift.push_back(layer.shift());
    const double bytes = 2e-9 * static_cast<double>(layer.state_bytes());
    std::printf("%-8s %6d %8d %9.2f %9.2f %9.0f\n", std::string(codec_info(codec).name).c_str(), n_kv, n_threads, bytes / median(out),
                bytes / median(in), 1e9 * median(shift) / (static_cast<double>(n_kv) * kHeadsKv));
    std::fflush(stdout);
}

}  // namespace
}  // namespace turboquant

int main(int argc, char** argv) {
    using namespace turboquant;
    const std::string_view what = argc > 1 ? argv[1] : "decode";
    const double seconds = argc > 2 ? std::atof(argv[2]) : 2;
    if (what == "state") {
        std::printf("%-8s %6s %8s %9s %9s %9s\n", "codec", "cells", "threads", "save GB/s", "restore", "shift ns");
        for (const CodecId codec : {CodecId::turbo4, CodecId::turbo3, CodecId::tcq3})
            for (const int n_kv : {512, 8192})
                for (const int n_threads : {1, 2}) move_state(codec, n_kv, n_threads, seconds);
        return 0;
    }
    std::printf("%-8s %6s %6s %8s %9s %9s %10s\n", "codec", "cells", "tokens", "threads", "ms none", "ms", "slower");
    for (const CodecId codec : {CodecId::turbo4, CodecId::tcq3})
        for (const int n_kv : {4096, 32768})
            for (const int n_threads : {1, 2})
                if (what == "decode" || n_kv == 32768) compare(codec, n_kv, what == "decode" ? 1 : 512, n_threads, seconds);
}
