// `turboquant bench`: our kernels beside llama.cpp's own, on the same data, in the same run.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <thread>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "llama.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/bench_cache.h"
#include "turboquant/cli/bench_cuda.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/kv_options.h"
#include "turboquant/cli/table.h"
#include "turboquant/cli/terminal.h"
#include "turboquant/cli/thread_team.h"
#include "turboquant/kernels/kernels.h"
#include "turboquant/llama/cache_spec.h"

namespace turboquant::cli {
namespace {

using namespace llama;

struct BenchOptions {
    std::vector<std::string> kv{"turbo4", "turbo3", "turbo2"};
    std::vector<int> tokens{4096, 32768};
    BenchShape shape;
    WindowSizes windows;
    bool prefill = false;
    int query_tokens = 0;  ///< 0: 1 for decode, 512 for prefill
    double seconds = 1;
    bool json = false;
    bool cuda = false;  ///< the CUDA kernels, alone
    int batch = 1;      ///< with cuda: sequences
    bool term = false;  ///< with cuda: the key offset too
};

constexpr const char* kBaselines[] = {"f16", "q8_0", "q4_0"};

struct Row {
    std::string op, kv;
    int tokens = 0, threads = 0;
    double ms = 0, ns_per_vector = 0, gb_per_s = 0, bandwidth_share = 0;
    std::optional<double> vs[3];  ///< speed ratio to each of kBaselines
    double error = 0;             ///< relative rms difference of the result from ggml's f16
};

/// Bytes per second at which all threads of this machine together read memory: a buffer several times the last-level cache, best of some
/// runs.
double read_bandwidth() {
    const int n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const auto cache = static_cast<std::size_t>(std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE)));
    const std::size_t words = std::max<std::size_t>(256u << 20, 4 * cache) / sizeof(std::uint64_t),
                      part = words / static_cast<std::size_t>(n_threads);
    const std::vector<std::uint64_t> buffer(words, 1);
    std::vector<std::uint64_t> sums(static_cast<std::size_t>(n_threads));
    ThreadTeam team(n_threads);
    double best = 0;
    for (int rep = 0; rep < 5; rep++) {
        const std::int64_t start = llama_time_us();
        team.run(n_threads, [&](int ith) {
            std::uint64_t sum = 0;
            for (std::size_t i = 0; i < part; i++) sum += buffer[static_cast<std::size_t>(ith) * part + i];
            sums[static_cast<std::size_t>(ith)] = sum;
        });
        best = std::max(
            best, static_cast<double>(part * sizeof(std::uint64_t)) * n_threads / (static_cast<double>(llama_time_us() - start) * 1e-6));
    }
    // The sums must be used, or the compiler drops the reading.
    if (sums[0] != part) throw CommandError("memory read back wrong: faulty memory?");
    return best;
}

/// Median time of each contender in seconds. They take turns, so that all see the same state of the machine.
std::vector<double> interleaved_medians(const std::vector<std::function<void()>>& contenders, double seconds_each, Work& work) {
    constexpr std::size_t kMinReps = 5, kMaxReps = 2000;
    std::vector<std::vector<double>> times(contenders.size());
    for (const auto& f : contenders) f();
    double spent = 0;
    const double budget = seconds_each * static_cast<double>(contenders.size());
    for (std::size_t rep = 0; rep < kMaxReps && (rep < kMinReps || spent < budget); rep++)
        for (std::size_t i = 0; i < contenders.size(); i++) {
            const auto start = std::chrono::steady_clock::now();
            contenders[i]();
            const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            times[i].push_back(s);
            spent += s;
            work.add(s);
        }
    std::vector<double> medians;
    for (auto& t : times) {
        std::ranges::nth_element(t, t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2));
        medians.push_back(t[t.size() / 2]);
    }
    return medians;
}

/// The baselines first, then what was asked for.
std::vector<CacheSpec> contenders_of(const BenchOptions& o) {
    std::vector<std::string> words(std::begin(kBaselines), std::end(kBaselines));
    words.insert(words.end(), o.kv.begin(), o.kv.end());
    std::vector<CacheSpec> specs = parse_cache_specs(words);
    for (CacheSpec& spec : specs)
        if (spec.ours) spec.ours->windows.set(o.windows);
    return specs;
}

void check(const BenchOptions& o) {
    const BenchShape& s = o.shape;
    if (s.n_head % s.n_head_kv)
        throw CommandError(fmt::format("--heads {} is no multiple of --kv-heads {}; choose sizes that divide", s.n_head, s.n_head_kv));
    if (!head_dim_supported(s.head_dim)) {
        throw CommandError(fmt::format("--head-dim {} is not supported; known: {}", s.head_dim, supported_head_dims()));
    }
    for (const int n : o.tokens)
        if (o.query_tokens > n)
            throw CommandError(
                fmt::format("{} query tokens do not fit into {} cached ones; use more --tokens or a smaller -q", o.query_tokens, n));
}

std::vector<Row> bench(BenchOptions o, bool attention) {
    if (o.query_tokens == 0) o.query_tokens = o.prefill && attention ? 512 : 1;
    check(o);
    const std::vector<CacheSpec> specs = contenders_of(o);
    const double bandwidth = read_bandwidth();
    const std::string op = !attention ? "encode" : o.prefill ? "attention_prefill" : "attention_decode";
    fmt::print(stderr, "{}: {} heads, {} KV heads of {}, {} query tokens, {} threads, simd {}; memory reads {:.1f} GB/s (all threads)\n",
               op, o.shape.n_head, o.shape.n_head_kv, o.shape.head_dim, o.query_tokens, o.shape.n_threads,
               simd_level_name(kernels_level(kernels())), bandwidth * 1e-9);

    // Preemption stretches long runs more than short ones, so on a busy machine ratios flatter what is fast.
    double load = 0;
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    if (getloadavg(&load, 1) == 1) {
        fmt::print(stderr, "load {:.1f} on {} cores\n", load, cores);
        if (load > cores) fmt::print(stderr, "warning: the machine is busy; repeat on an idle one before trusting times and ratios\n");
    }

    std::vector<Row> rows;
    const Monitor monitor = terminal_monitor();
    Work work(monitor, "bench", o.seconds * static_cast<double>(specs.size() * o.tokens.size()));
    for (const int n_kv : o.tokens) {
        BenchShape shape = o.shape;
        shape.n_kv = n_kv, shape.n_tokens = o.query_tokens;
        const BenchData data(shape);
        std::vector<std::unique_ptr<BenchCache>> caches;
        std::vector<std::function<void()>> contenders;
        for (const CacheSpec& spec : specs) {
            caches.push_back(make_bench_cache(spec, shape, data));
            BenchCache* cache = caches.back().get();
            cache->encode();
            if (attention)
                contenders.emplace_back([cache] { cache->attend(); });
            else
                contenders.emplace_back([cache] { cache->encode(); });
        }
        const std::vector<double> seconds = interleaved_medians(contenders, o.seconds, work);
        // What is fast but wrong is no result.
        for (auto& cache : caches) cache->attend();
        const double stored = 2.0 * n_kv * shape.n_head_kv;  // vectors, keys and values
        for (std::size_t i = 0; i < specs.size(); i++) {
            Row r;
            r.op = op, r.kv = specs[i].name, r.tokens = n_kv, r.threads = shape.n_threads, r.ms = 1e3 * seconds[i];
            r.ns_per_vector = 1e9 * seconds[i] / (stored * (attention ? shape.n_tokens : 1));
            const double moved = caches[i]->bytes() + (attention ? 0 : stored * shape.head_dim * sizeof(float));
            r.gb_per_s = moved / seconds[i] * 1e-9;
            r.bandwidth_share = moved / seconds[i] / bandwidth;
            for (std::size_t b = 0; b < std::size(kBaselines); b++) r.vs[b] = seconds[b] / seconds[i];
            r.error = relative_error(caches[0]->output(), caches[i]->output());
            if (const std::string fault = caches[i]->fault(); !fault.empty())
                throw CommandError(fmt::format("--kv {} gives a wrong result ({}); please report it", r.kv, fault));
            rows.push_back(std::move(r));
        }
    }
    return rows;
}

nlohmann::ordered_json to_json(const std::vector<Row>& rows) {
    auto out = nlohmann::ordered_json::array();
    for (const Row& r : rows) {
        nlohmann::ordered_json row{{"op", r.op},
                                   {"kv", r.kv},
                                   {"tokens", r.tokens},
                                   {"threads", r.threads},
                                   {"ms", r.ms},
                                   {"ns_per_vector", r.ns_per_vector},
                                   {"gb_per_s", r.gb_per_s},
                                   {"bandwidth_share", r.bandwidth_share}};
        for (std::size_t b = 0; b < std::size(kBaselines); b++)
            row[fmt::format("vs_ggml_{}", kBaselines[b])] = r.vs[b] ? nlohmann::ordered_json(*r.vs[b]) : nullptr;
        out.push_back(std::move(row));
    }
    return out;
}

std::string to_table(const std::vector<Row>& rows) {
    std::vector<std::vector<std::string>> table{
        {"op", "kv", "tokens", "threads", "ms", "ns/vector", "GB/s", "of memory", "vs f16", "vs q8_0", "vs q4_0", "rel. error"}};
    const auto ratio = [](std::optional<double> x) { return x ? fmt::format("{:.2f}x", *x) : "-"; };
    for (const Row& r : rows)
        table.push_back({r.op, r.kv, std::to_string(r.tokens), std::to_string(r.threads), fmt::format("{:.3f}", r.ms),
                         fmt::format("{:.1f}", r.ns_per_vector), fmt::format("{:.2f}", r.gb_per_s),
                         fmt::format("{:.0f} %", 100 * r.bandwidth_share), ratio(r.vs[0]), ratio(r.vs[1]), ratio(r.vs[2]),
                         fmt::format("{:.4f}", r.error)});
    return format_table(table);
}

void add_shared_options(CLI::App* cmd, const std::shared_ptr<BenchOptions>& o) {
    cmd->add_option("--kv", o->kv, "KV cache formats; f16, q8_0 and q4_0 of llama.cpp always run too")->capture_default_str();
    cmd->add_option("--kv-heads", o->shape.n_head_kv, "KV heads")->check(CLI::Range(1, 4096))->capture_default_str();
    cmd->add_option("--head-dim", o->shape.head_dim, "Head size")->check(CLI::Range(1, 4096))->capture_default_str();
    cmd->add_option("--tokens", o->tokens, "Cached tokens, e.g. 4096,32768")
        ->delimiter(',')
        ->check(CLI::Range(1, 1 << 24))
        ->capture_default_str();
    add_window_options(*cmd, o->windows);
    cmd->add_option("-t,--threads", o->shape.n_threads, "Threads")->check(CLI::Range(1, 4096))->capture_default_str();
    cmd->add_option("--seconds", o->seconds, "Time per format and size, at least five runs")
        ->check(CLI::Range(0.0, 3600.0))
        ->capture_default_str();
    cmd->add_option("--backend", o->cuda, "cpu: beside llama.cpp's formats; cuda: the CUDA kernels, alone")
        ->transform(CLI::CheckedTransformer(std::map<std::string, bool>{{"cpu", false}, {"cuda", true}}));
    cmd->add_flag("--term", o->term, "With cuda: with the key offset");
    cmd->add_flag("--json", o->json, "Print a JSON array instead of a table");
}

/// False: nothing was asked of the GPU.
bool benched_on_gpu(const BenchOptions& o, bool attention) {
    if (!o.cuda) {
        if (o.batch != 1 || o.term) throw CommandError("--batch and --term are for --backend cuda; add that, or leave them out");
        return false;
    }
    CudaBenchOptions gpu{o.kv, o.tokens, o.shape, o.batch, o.query_tokens ? o.query_tokens : o.prefill ? 512 : 1, 0, o.term, o.json};
    gpu.exact_rows = std::max(0, o.windows.sink) + std::max(0, o.windows.recent);
    check(o);
    fmt::print("{}", bench_cuda(gpu, attention));
    return true;
}

void print(const std::vector<Row>& rows, bool json) { fmt::print("{}", json ? to_json(rows).dump(2) + "\n" : to_table(rows)); }

}  // namespace

void add_bench(CLI::App& app, const GlobalOptions& global) {
    CLI::App* cmd = app.add_subcommand("bench", "Speed of the kernels beside llama.cpp's own");
    cmd->require_subcommand(1);

    auto a = std::make_shared<BenchOptions>();
    CLI::App* attention = cmd->add_subcommand("attention", "Attention over a filled cache");
    add_shared_options(attention, a);
    attention->add_option("--heads", a->shape.n_head, "Query heads")->check(CLI::Range(1, 65536))->capture_default_str();
    attention->add_option("--mode", a->prefill, "decode: one query token; prefill: many, the last ones of the cache")
        ->transform(CLI::CheckedTransformer(std::map<std::string, bool>{{"decode", false}, {"prefill", true}}));
    attention->add_option("-q,--query-tokens", a->query_tokens, "Query tokens (default: 1 for decode, 512 for prefill)")
        ->check(CLI::Range(1, 1 << 20));
    attention->add_option("--batch", a->batch, "With cuda: sequences")->check(CLI::Range(1, 4096))->capture_default_str();
    attention->callback([a] {
        if (!benched_on_gpu(*a, true)) print(bench(*a, true), a->json);
    });

    auto e = std::make_shared<BenchOptions>();
    e->tokens = {4096};
    CLI::App* encode = cmd->add_subcommand("encode", "Writing keys and values into the cache");
    add_shared_options(encode, e);
    encode->callback([e] {
        e->shape.n_head = e->shape.n_head_kv;
        if (!benched_on_gpu(*e, false)) print(bench(*e, false), e->json);
    });
    add_bench_decode(*cmd, global);
}

}  // namespace turboquant::cli
