#include "turboquant/measure/decode_speed.h"

#include <algorithm>
#include <memory>

#include "turboquant/measure/score.h"

namespace turboquant::measure {
namespace {

constexpr int kTurn = 8;  ///< timed tokens before the next format has its turn

}  // namespace

std::vector<int> default_depths(int n_ctx) {
    const int most = std::max(0, n_ctx - kTimedTokens);
    std::vector<int> depths{0, std::min(n_ctx / 4, most), std::min(n_ctx / 2, most), most};
    depths.erase(std::unique(depths.begin(), depths.end()), depths.end());
    return depths;
}

std::vector<DecodeSpeed> decode_speed(llama::ModelFile& file, const std::vector<llama::CacheSpec>& specs,
                                      std::span<const llama_token> tokens, const std::vector<int>& depths, llama::ContextOptions options) {
    if (specs.empty() || depths.empty()) return {};
    options.n_ctx = (depths.back() + kTimedTokens + 255) / 256 * 256;
    std::vector<std::unique_ptr<llama::Session>> sessions;
    if (std::ranges::any_of(specs, [](const llama::CacheSpec& s) { return s.ours.has_value(); })) file.use_device();
    for (const llama::CacheSpec& spec : specs) sessions.push_back(std::make_unique<llama::Session>(file, spec, options));
    std::vector<llama_token> text(static_cast<std::size_t>(options.n_ctx));
    for (std::size_t i = 0; i < text.size(); i++) text[i] = tokens[i % tokens.size()];
    const auto decode = [&](llama::Session& session, int pos, int n, bool output) {
        const auto piece = std::span(text).subspan(static_cast<std::size_t>(pos), static_cast<std::size_t>(n));
        session.decode(piece, pos, pos + n - (output ? 1 : 0), pos + n);
    };
    std::vector<DecodeSpeed> out;
    llama::Work work(file.monitor(), "decode speed", static_cast<double>(sessions.size()) * options.n_ctx);
    // Untimed first steps: memory and caches are cold, and threads asleep, whatever the depth.
    constexpr int kWarmUp = 8;
    for (const auto& session : sessions)
        for (int i = 0; i < std::min(kWarmUp, options.n_ctx - 1); i++) decode(*session, i, 1, true);
    for (const int depth : depths) {
        for (const auto& session : sessions) {  // from the beginning: every depth is the same state, whatever was timed before
            session->clear();
            const int n_batch = static_cast<int>(llama_n_batch(session->context()));
            for (int at = 0; at < depth; at += n_batch) decode(*session, at, std::min(n_batch, depth - at), false);
            llama_synchronize(session->context());
        }
        std::vector<std::vector<double>> ms(sessions.size());
        for (int at = 0; at < kTimedTokens; at += kTurn)
            for (std::size_t s = 0; s < sessions.size(); s++)
                for (int i = 0; i < kTurn; i++) {
                    const std::int64_t start = llama_time_us();
                    decode(*sessions[s], depth + at + i, 1, true);
                    llama_synchronize(sessions[s]->context());
                    ms[s].push_back(static_cast<double>(llama_time_us() - start) * 1e-3);
                }
        for (std::size_t s = 0; s < sessions.size(); s++) {
            std::ranges::sort(ms[s]);
            out.push_back({specs[s].name, depth, std::max(quantile(ms[s], 0.5), 1e-3)});
        }
        work.add(static_cast<double>(sessions.size()) * options.n_ctx / static_cast<double>(depths.size()));
    }
    return out;
}

}  // namespace turboquant::measure
