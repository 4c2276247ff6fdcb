#include "turboquant/cli/bench_cuda.h"

#include "turboquant/cli/command.h"

#ifdef TQ_HAS_CUDA
#include <optional>
#include <utility>

#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "turboquant/cli/table.h"
#include "turboquant/cuda/fragment_order.h"
#include "turboquant/cuda/timing.h"

namespace turboquant::cli {
namespace {

CodecId codec_of(const std::string& word, const std::string& spec) {
    const std::optional<CodecId> id = find_codec(word);
    if (!id)
        throw CommandError(
            fmt::format("--kv {}: the CUDA kernels know no format {}; give one of ours, e.g. turbo4 or k=turbo4,v=turbo3", spec, word));
    if (!cuda::has_fragment_order(*id)) throw CommandError(fmt::format("--kv {}: {} has no CUDA kernels; use --backend cpu", spec, word));
    return *id;
}

/// Formats of keys and values.
std::pair<CodecId, CodecId> sides_of(const std::string& spec) {
    if (const std::size_t comma = spec.find(",v="); spec.starts_with("k=") && comma != std::string::npos)
        return {codec_of(spec.substr(2, comma - 2), spec), codec_of(spec.substr(comma + 3), spec)};
    const CodecId both = codec_of(spec, spec);
    return {both, both};
}

struct Row {
    std::string op, kv;
    int batch = 1, tokens = 0;
    cuda::Timing time;
};

std::string to_text(const std::vector<Row>& rows, const cuda::Device& device, double bandwidth, const char* of, bool json) {
    if (json) {
        auto out = nlohmann::ordered_json::array();
        for (const Row& r : rows)
            out.push_back({{"op", r.op},
                           {"kv", r.kv},
                           {"device", device.name},
                           {"batch", r.batch},
                           {"tokens", r.tokens},
                           {"us", r.time.us},
                           {"gb_per_s", r.time.bytes / r.time.us * 1e-3},
                           {"bandwidth_share", r.time.bytes / r.time.us * 1e6 / bandwidth}});
        return out.dump(2) + "\n";
    }
    std::vector<std::vector<std::string>> table{{"op", "kv", "batch", "tokens", "us", "GB/s", fmt::format("of {}", of)}};
    for (const Row& r : rows)
        table.push_back({r.op, r.kv, std::to_string(r.batch), std::to_string(r.tokens), fmt::format("{:.1f}", r.time.us),
                         fmt::format("{:.0f}", r.time.bytes / r.time.us * 1e-3),
                         fmt::format("{:.0f} %", r.time.bytes / r.time.us * 1e8 / bandwidth)});
    return fmt::format("{}, {} {:.2f} TB/s\n{}", device.name, of, bandwidth * 1e-12, format_table(table));
}

}  // namespace

std::string bench_cuda(const CudaBenchOptions& o, bool attention) try {
    std::vector<std::pair<CodecId, CodecId>> formats;
    for (const std::string& spec : o.kv) formats.push_back(sides_of(spec));
    cuda::KernelTimer timer;
    const double bandwidth = attention ? timer.read_bandwidth() : timer.copy_bandwidth();
    std::vector<Row> rows;
    for (const int n : o.tokens)
        for (std::size_t i = 0; i < formats.size(); ++i) {
            const auto [k, v] = formats[i];
            if (attention) {
                rows.push_back({o.query_tokens > 8 ? "attention_prefill" : "attention_decode", o.kv[i], o.batch, n,
                                timer.attention({k, v, o.batch, n, o.shape.head_dim, o.shape.n_head, o.shape.n_head_kv, o.query_tokens,
                                                 true, o.term, o.exact_rows})});
                continue;
            }
            for (const Side side : {Side::key, Side::value})
                rows.push_back({side == Side::key ? "encode_keys" : "encode_values", o.kv[i], 1, n,
                                timer.encode({side == Side::key ? k : v, side, o.shape.head_dim, o.shape.n_head_kv, n, false,
                                              o.term && side == Side::key})});
        }
    return to_text(rows, timer.device(), bandwidth, attention ? "reading" : "copying", o.json);
} catch (const CommandError&) {
    throw;
} catch (const std::runtime_error& e) {
    throw CommandError(fmt::format("--backend cuda: {}; on a machine without a GPU use --backend cpu", e.what()));
}

}  // namespace turboquant::cli

#else

namespace turboquant::cli {

std::string bench_cuda(const CudaBenchOptions&, bool) {
    throw CommandError("--backend cuda: this build has no CUDA kernels; configure with -DTQ_CUDA=ON where nvcc is, or use --backend cpu");
}

}  // namespace turboquant::cli
#endif
