#include "turboquant/measure/kld_meter.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/error.h"
#include "turboquant/measure/parallel.h"

namespace turboquant::measure {
namespace {

constexpr int kBatch = 512;  // the logits of one call are held by llama.cpp too

}  // namespace

KldMeter::KldMeter(llama::ModelFile& file, const llama::Calibration& text, const llama::CacheSpec& reference, llama::ContextOptions options)
    : file_(&file), text_(&text), options_(options) {
    const std::size_t length = text.sequences.at(0).size();
    n_scored_ = std::max<std::size_t>(1, length * 3 / 4);
    options_.n_ctx = static_cast<int>(length);
    options_.n_batch = kBatch;
    options_.n_ubatch = std::min(options_.n_ubatch, kBatch);
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const auto n_vocab = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(file.model().get())));
    logits_ = std::make_unique<LogitFile>(n_scored(), n_vocab);
    memory_ = run(reference, [&](std::size_t row, std::size_t n, const float* logits) { logits_->write(row, {logits, n * n_vocab}); });
}

/// Calls sink(first row, count, logits) for each piece of logits.
template <class Sink>
llama::KvMemory KldMeter::run(const llama::CacheSpec& spec, Sink&& sink) {
    llama::Session session(*file_, spec, options_);
    const std::size_t length = text_->sequences[0].size();
    const int first = static_cast<int>(length - n_scored_);
    for (std::size_t s = 0; s < text_->sequences.size(); s++) {
        session.clear();
        session.feed(text_->sequences[s], 0, first, static_cast<int>(length), 0, nullptr, [&](int pos, int n, const float* logits) {
            sink(s * n_scored_ + static_cast<std::size_t>(pos - first), static_cast<std::size_t>(n), logits);
        });
    }
    return session.memory();
}

std::vector<double> KldMeter::divergences(const llama::CacheSpec& spec) {
    std::vector<double> kld(n_scored());
    const std::size_t n_vocab = logits_->n_vocab();
    run(spec, [&](std::size_t row, std::size_t n, const float* logits) {
        parallel_for(n, options_.n_threads, [&](std::size_t i) {
            thread_local std::vector<float> reference;
            reference.resize(n_vocab);
            const bool read = logits_->read(row + i, reference);
            kld[row + i] = read ? score_token(reference, {logits + i * n_vocab, n_vocab}, 0).kld : NAN;
        });
    });
    if (!std::ranges::all_of(kld, [](double x) { return std::isfinite(x); }))
        throw llama::Error(
            fmt::format("the model gave logits that are not numbers with --kv {}; try another format, and report it", spec.name));
    return kld;
}

}  // namespace turboquant::measure
