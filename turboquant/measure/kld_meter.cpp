#include "turboquant/measure/kld_meter.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "fmt/format.h"
#include "turboquant/measure/parallel.h"
#include "turboquant/measure/score.h"

namespace turboquant::measure {
namespace {

constexpr double kLogitBytes = 512.0 * (1 << 20);
constexpr int kBatch = 512;  // the logits of one call are held by llama.cpp too

}  // namespace

KldMeter::KldMeter(llama::ModelFile& file, const llama::Calibration& text, const llama::CacheSpec& reference, llama::ContextOptions options)
    : file_(&file), text_(&text), options_(options) {
    const std::size_t length = text.sequences.at(0).size();
    options_.n_ctx = static_cast<int>(length);
    options_.n_batch = kBatch;
    options_.n_ubatch = std::min(options_.n_ubatch, kBatch);
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    memory_ = run(reference, [&](std::size_t seq, std::size_t at, std::size_t n, const float* logits) {
        logits_.resize(text_->sequences.size() * n_scored_ * n_vocab_);
        std::copy_n(logits, n * n_vocab_, logits_.begin() + static_cast<std::ptrdiff_t>((seq * n_scored_ + at) * n_vocab_));
    });
}

/// Calls sink(sequence, first scored position, count, logits) for each piece of logits.
template <class Sink>
llama::KvMemory KldMeter::run(const llama::CacheSpec& spec, Sink&& sink) {
    llama::Session session(*file_, file_->load(spec), spec, options_);
    const std::size_t length = text_->sequences[0].size();
    n_vocab_ = static_cast<std::size_t>(session.n_vocab());
    const auto room = static_cast<std::size_t>(kLogitBytes / (4.0 * static_cast<double>(n_vocab_ * text_->sequences.size())));
    n_scored_ = std::clamp<std::size_t>(room, 1, length * 3 / 4);
    const int first = static_cast<int>(length - n_scored_);
    for (std::size_t s = 0; s < text_->sequences.size(); s++) {
        session.clear();
        session.feed(text_->sequences[s], 0, first, static_cast<int>(length), 0, nullptr, [&](int pos, int n, const float* logits) {
            sink(s, static_cast<std::size_t>(pos - first), static_cast<std::size_t>(n), logits);
        });
    }
    return session.memory();
}

Divergence KldMeter::measure(const llama::CacheSpec& spec) {
    std::vector<double> kld(n_scored());
    run(spec, [&](std::size_t seq, std::size_t at, std::size_t n, const float* logits) {
        parallel_for(n, options_.n_threads, [&](std::size_t i) {
            const std::size_t row = seq * n_scored_ + at + i;
            kld[row] = score_token(std::span(logits_).subspan(row * n_vocab_, n_vocab_), {logits + i * n_vocab_, n_vocab_}, 0).kld;
        });
    });
    Divergence d;
    double square = 0;
    for (const double x : kld) d.mean += x, square += x * x;
    const auto n = static_cast<double>(kld.size());
    d.mean /= n;
    d.error = std::sqrt(std::max(0.0, square / n - d.mean * d.mean) / n);
    if (!std::isfinite(d.mean))
        throw llama::Error(
            fmt::format("the model gave logits that are not numbers with --kv {}; try another format, and report it", spec.name));
    return d;
}

}  // namespace turboquant::measure
