// Attention on the GPU, timed (turboquant/cuda/timing.h). One line per case, as a table or, with --json, for scripts/bench-gpu.
// usage: cuda_bench [--json] [--quick] [--only BATCHxCELLS] [--tokens N] [--exact N] [--kinds decode,term,heads,tokens,window,cold,rehearsed,drafts,prefill,prefill-term,all-cells] [--formats turbo4,...]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "turboquant/cuda/timing.h"

namespace turboquant::cuda {
namespace {

struct Case : AttentionCase {
    std::string kind, name;
    Case(std::string what, CodecId key, CodecId value, int n_seq, int cells) : kind(std::move(what)), name(codec_info(key).name) {
        k = key, v = value, batch = n_seq, n_kv = cells;
        if (key != value) name += "/" + std::string(codec_info(value).name);
    }
};

std::vector<Case> cases(const std::string& kinds, const std::vector<CodecId>& formats, bool quick) {
    std::vector<Case> all;
    const auto has = [&](const char* kind) {
        return kinds.empty() || ("," + kinds + ",").find("," + std::string(kind) + ",") != std::string::npos;
    };
    constexpr int shapes[][2] = {{1, 4096}, {1, 32768}, {1, 131072}, {8, 32768}, {32, 32768}};
    for (const bool term : {false, true})
        if (has(term ? "term" : "decode"))
            for (const CodecId f : formats)
                for (const auto& s : shapes)
                    if (!quick || s[0] == 32 || s[1] == 131072 || s[1] == 4096) {
                        Case c(term ? "term" : "decode", f, f, s[0], s[1]);
                        c.term = term;
                        all.push_back(c);
                    }
    if (has("mixed")) all.emplace_back("mixed", CodecId::turbo4, CodecId::turbo3, 32, 32768);
    if (has("heads"))
        for (const CodecId f : {CodecId::turbo4, CodecId::turbo3, CodecId::tcq3})
            for (const auto& [d, group] :
                 {std::pair{64, 4}, {256, 4}, {128, 1}, {128, 2}, {128, 7}, {128, 8}, {96, 4}, {80, 4}, {112, 4}, {192, 4}, {512, 4}}) {
                Case c("heads", f, f, 32, 32768);
                c.head_dim = d, c.n_head_kv = d >= 256 ? 4 : 8, c.n_head = group * c.n_head_kv;
                if (d == 512) c.batch = 16;
                all.push_back(c);
            }
    if (has("tokens"))
        for (const CodecId f : {CodecId::turbo4, CodecId::turbo3, CodecId::tcq3})
            for (const int tokens : {1, 2, 4, 8}) {
                Case c("tokens", f, f, 8, 32768);
                c.n_tokens = tokens;
                all.push_back(c);
            }
    if (has("window"))
        for (const CodecId f : {CodecId::turbo4, CodecId::tcq3})
            for (const auto& s : shapes) {
                Case c("window", f, f, s[0], s[1]);
                c.exact = 192;
                all.push_back(c);
            }
    for (const std::string kind : {"cold", "rehearsed"})
        if (has(kind.c_str()))
            for (const CodecId f : formats)
                for (const auto& [batch, cells] : {std::pair{1, 512}, {1, 4096}, {1, 8192}, {1, 32768}, {1, 131072}, {4, 8192}, {16, 8192}})
                    for (const bool whole : {false, true}) {  // with the term and a window, as a cache has them
                        Case c(kind + (whole ? "+" : ""), f, f, batch, cells);
                        c.cold = true, c.rehearsed = kind == "rehearsed";
                        if (whole) c.term = true, c.exact = 192;
                        all.push_back(c);
                    }
    if (has("drafts"))  // either way: a plan has to choose
        for (const CodecId f : formats)
            for (const bool term : {false, true})
                for (const int cells : {2048, 8192, 32768, 131072})
                    for (const int tokens : {8, 12, 16, 24, 32})
                        for (const bool decode : {true, false}) {
                            if (tokens == 8 && !decode) continue;
                            Case c(std::string("draft") + (term ? "+ " : " ") + (decode ? "dec" : "pre"), f, f, 1, cells);
                            c.n_tokens = tokens, c.term = term, c.by_decode = decode;
                            all.push_back(c);
                        }
    for (const std::string kind : {"prefill", "prefill-term", "all-cells"})
        if (has(kind.c_str()))
            for (const CodecId f : formats)
                for (const int tokens : {32, 128, 512, 2048}) {
                    Case c(kind, f, f, 1, 32768);
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
    int only_batch = 0, only_kv = 0, only_tokens = 0, exact = -1;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "--json")
            json = true;
        else if (arg == "--quick")
            quick = true;
        else if (arg == "--only" && i + 1 < argc)
            std::sscanf(argv[++i], "%dx%d", &only_batch, &only_kv);
        else if (arg == "--tokens" && i + 1 < argc)
            only_tokens = std::atoi(argv[++i]);
        else if (arg == "--exact" && i + 1 < argc)  // rows of windows, in the kinds that have some
            exact = std::atoi(argv[++i]);
        else if (arg == "--kinds" && i + 1 < argc)
            kinds = argv[++i];
        else if (arg == "--formats" && i + 1 < argc) {
            formats.clear();
            std::string list = argv[++i];
            for (std::size_t at = 0; at <= list.size();) {
                const std::size_t end = std::min(list.find(',', at), list.size());
                const auto id = find_codec(list.substr(at, end - at));
                if (!id) throw std::runtime_error("unknown format in --formats");
                formats.push_back(*id), at = end + 1;
            }
        } else
            throw std::runtime_error("unknown argument " + arg);
    }
    KernelTimer timer;
    const Device& device = timer.device();
    const double bandwidth = timer.read_bandwidth() * 1e-12;
    if (!json)
        std::printf("# %s, %d SMs, L2 %zu MB, reads %.2f TB/s\n", device.name.c_str(), device.n_sm, device.l2_bytes >> 20, bandwidth);
    for (Case c : cases(kinds, formats, quick)) {
        if (c.exact && exact >= 0) c.exact = exact;
        if (only_batch && (c.batch != only_batch || c.n_kv != only_kv)) continue;
        if (only_tokens && c.n_tokens != only_tokens) continue;
        try {
            const Timing r = timer.attention(c);
            if (json)
                std::printf(
                    "{\"device\": \"%s\", \"read_tb_per_s\": %.3f, \"kind\": \"%s\", \"format\": \"%s\", \"batch\": %d, \"n_kv\": %d, "
                    "\"head_dim\": %d, \"n_head\": %d, \"n_head_kv\": %d, \"n_tokens\": %d, \"exact\": %d, \"us\": %.3f, \"tb_per_s\": "
                    "%.3f}\n",
                    device.name.c_str(), bandwidth, c.kind.c_str(), c.name.c_str(), c.batch, c.n_kv, c.head_dim, c.n_head, c.n_head_kv,
                    c.n_tokens, c.exact, r.us, r.bytes / r.us * 1e-6);
            else
                std::printf("%-12s %-13s %2d x %6d  %2d/%d x %3d  q %4d  %9.1f us  %5.2f TB/s  %3.0f %%  (%d parts)\n", c.kind.c_str(),
                            c.name.c_str(), c.batch, c.n_kv, c.n_head, c.n_head_kv, c.head_dim, c.n_tokens, r.us, r.bytes / r.us * 1e-6,
                            100 * r.bytes / r.us * 1e-6 / bandwidth, r.parts);
        } catch (const std::exception& e) {
            std::printf("# %s %s %d x %d d %d q %d: %s\n", c.kind.c_str(), c.name.c_str(), c.batch, c.n_kv, c.head_dim, c.n_tokens,
                        e.what());
        }
        std::fflush(stdout);
    }
    return 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
    return 1;
}
