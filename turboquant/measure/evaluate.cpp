#include "turboquant/measure/evaluate.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>
#include <thread>

#include "fmt/format.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/logit_file.h"
#include "turboquant/measure/parallel.h"

namespace turboquant::measure {
namespace {

/// The text in chunks of n_ctx tokens, the first token of each replaced by BOS if the model wants one.
std::vector<llama_token> chunked_tokens(const llama_vocab* vocab, const EvalOptions& o) {
    if (llama_vocab_get_add_eos(vocab))
        throw llama::Error("this model's tokenizer ends every text with an end token; perplexity over chunks is not defined for it");
    std::vector<llama_token> tokens = llama::tokenize(vocab, llama::read_text_file(o.text_file), false);
    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx);
    const std::size_t n_chunks = std::min(tokens.size() / n_ctx, static_cast<std::size_t>(o.chunks));
    if (n_chunks == 0)
        throw llama::Error(fmt::format("text file '{}' has {} tokens, less than one chunk of {}; use a longer text or a smaller -c",
                                       o.text_file, tokens.size(), n_ctx));
    tokens.resize(n_chunks * n_ctx);
    if (llama_vocab_get_add_bos(vocab))
        for (std::size_t c = 0; c < n_chunks; c++) tokens[c * n_ctx] = llama_vocab_bos(vocab);
    return tokens;
}

constexpr double kSameBits = 0.005;  ///< rows this near to each other take the same bits

/// One cache on one chunk: run, scored against the reference, gone again.
class ChunkRunner {
  public:
    ChunkRunner(llama::ModelFile& file, const EvalOptions& o, std::size_t n_vocab, llama::Work& work)
        : file_(file), o_(o), work_(work), reference_(static_cast<std::size_t>(n_scored()), n_vocab) {}

    int first_scored() const { return o_.context.n_ctx / 2; }
    /// Positions n/2 .. n-2: the second half, except the last token, whose successor lies outside.
    int n_scored() const { return o_.context.n_ctx - 1 - first_scored(); }

    void run_reference(const llama::CacheSpec& spec, std::span<const llama_token> chunk) {
        llama::Session session(file_, spec, context());
        run(session, chunk, 0, [&](std::size_t row, std::size_t n, const float* logits) {
            reference_.write(row, {logits, n * reference_.n_vocab()});
        });
        told(session, "reference ", EvalMode::batch);
    }

    /// Appends the scores.
    llama::KvMemory run_format(const llama::CacheSpec& spec, std::span<const llama_token> chunk, std::vector<TokenScore>& out) {
        llama::Session session(file_, spec, context());
        const std::size_t before = out.size(), n_vocab = reference_.n_vocab();
        out.resize(before + static_cast<std::size_t>(n_scored()));
        run(session, chunk, o_.mode == EvalMode::decode ? 1 : 0, [&](std::size_t row, std::size_t n, const float* logits) {
            parallel_for(n, n > 1 ? o_.context.n_threads : 1, [&](std::size_t i) {
                thread_local std::vector<float> reference;
                reference.resize(n_vocab);
                const llama_token next = chunk[static_cast<std::size_t>(first_scored()) + row + i + 1];
                if (reference_.read(row + i, reference))
                    out[before + row + i] = score_token(reference, {logits + i * n_vocab, n_vocab}, next);
                else
                    out[before + row + i].kld = NAN;
            });
        });
        told(session, "", o_.mode);
        return session.memory();
    }

  private:
    /// llama.cpp holds the logits of one call: no more than a micro-batch at once, which computes the same.
    llama::ContextOptions context() const {
        llama::ContextOptions c = o_.context;
        c.n_batch = std::min(c.n_batch, c.n_ubatch);
        return c;
    }

    template <class Sink>
    void run(llama::Session& session, std::span<const llama_token> chunk, int per_call, Sink&& sink) {
        session.feed(chunk, 0, first_scored(), first_scored() + n_scored(), per_call, &work_, [&](int pos, int n, const float* logits) {
            sink(static_cast<std::size_t>(pos - first_scored()), static_cast<std::size_t>(n), logits);
        });
    }

    /// The effective configuration, once.
    void told(const llama::Session& session, const char* role, EvalMode mode) {
        const std::string line = fmt::format("{}{}, {} mode", role, session.config(), mode == EvalMode::batch ? "batch" : "decode");
        if (told_.insert(line).second) file_.monitor().note(line);
    }

    llama::ModelFile& file_;
    const EvalOptions& o_;
    llama::Work& work_;
    LogitFile reference_;
    std::set<std::string> told_;
};

/// Rows that cannot be anybody's best other row: they are the reference, or the floor.
bool is_reference(const EvalResult& r) { return r.floor || (!r.spec.ours && r.memory.bits_per_value >= 16); }

/// Fills in best_other.
void compare(std::vector<EvalResult>& results, const std::vector<std::vector<TokenScore>>& scores) {
    for (std::size_t i = 0; i < results.size(); i++) {
        if (is_reference(results[i])) continue;
        std::optional<std::size_t> best;
        for (std::size_t j = 0; j < results.size(); j++) {
            const bool counts =
                j != i && !is_reference(results[j]) && results[j].memory.bits_per_value <= results[i].memory.bits_per_value + kSameBits;
            if (counts && (!best || results[j].score.mean_kld < results[*best].score.mean_kld)) best = j;
        }
        if (best) results[i].best_other = {results[*best].spec.name, paired_difference(scores[i], scores[*best])};
    }
}

/// What cannot be told apart by these measurements.
void note_floor(const std::vector<EvalResult>& results, const llama::Monitor& monitor) {
    const EvalResult* floor = floor_of(results);
    if (!floor) return;
    monitor.note(fmt::format("note: weights are quantized, so different rounding alone (raw: f16 rows in our cache) costs {:.6f}",
                             floor->score.mean_kld));
    for (const EvalResult& r : results)
        if (r.best_other && std::abs(r.best_other->difference.mean) < floor->score.mean_kld)
            monitor.note(fmt::format("note: {} and {} differ by less than that; --weights f16 shows the cache alone", r.spec.name,
                                     r.best_other->other));
}

}  // namespace

const EvalResult* floor_of(const std::vector<EvalResult>& results) {
    const auto found = std::ranges::find_if(results, &EvalResult::floor);
    return found != results.end() ? &*found : nullptr;
}

std::vector<EvalResult> evaluate(llama::ModelFile& file, EvalOptions o) {
    const KvArguments arguments(o.kv, o.windows);
    if (o.context.n_threads == 0) o.context.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    const llama::CacheSpec f16 = llama::parse_cache_spec("f16");
    if (arguments.need_device()) file.use_device();
    const std::shared_ptr<llama_model> model = file.model();
    const std::vector<llama_token> tokens = chunked_tokens(llama_model_get_vocab(model.get()), o);
    std::vector<std::optional<Plan>> plans;
    std::vector<llama::CacheSpec> specs =
        arguments.resolve(file, o.context.n_ctx, {.calib_file = o.calib_file, .n_threads = o.context.n_threads}, &plans);
    const bool with_floor = file.quantized() && arguments.need_device() &&
                            std::ranges::none_of(specs, [](const llama::CacheSpec& s) { return s.name == "raw"; });
    if (with_floor) specs.push_back(llama::parse_cache_spec("raw")), plans.emplace_back();

    const auto n_ctx = static_cast<std::size_t>(o.context.n_ctx), n_chunks = tokens.size() / n_ctx;
    const auto note = [&](const std::string& line) { file.monitor().note(line); };
    llama::Work work(file.monitor(), "eval", static_cast<double>(tokens.size() * (specs.size() + 1)));
    ChunkRunner runner(file, o, static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model.get()))), work);
    note(fmt::format(
        "model {}: {} chunks of {} tokens{}, {} scored", file.path(), n_chunks, n_ctx,
        n_chunks < static_cast<std::size_t>(o.chunks) ? fmt::format(" (the text has no more than that; {} asked for)", o.chunks) : "",
        n_chunks * static_cast<std::size_t>(runner.n_scored())));
    if (const int trained = llama_model_n_ctx_train(model.get()); trained < o.context.n_ctx)
        note(fmt::format("warning: the model was trained on contexts of {} tokens only", trained));

    std::vector<EvalResult> results(specs.size());
    std::vector<std::vector<TokenScore>> scores(specs.size());
    for (std::size_t c = 0; c < n_chunks; c++) {
        const auto chunk = std::span(tokens).subspan(c * n_ctx, n_ctx);
        runner.run_reference(f16, chunk);
        for (std::size_t s = 0; s < specs.size(); s++) results[s].memory = runner.run_format(specs[s], chunk, scores[s]);
    }
    for (std::size_t s = 0; s < specs.size(); s++) {
        EvalResult& r = results[s];
        r.spec = specs[s], r.score = summarize(scores[s]), r.plan = plans[s];
        r.floor = with_floor && s + 1 == specs.size();
        if (!std::isfinite(r.score.mean_kld) || !std::isfinite(r.score.ppl_ref))
            throw llama::Error(
                fmt::format("the model gave logits that are not numbers, with --kv {} or with f16; try other --kv and -ub, and report it",
                            specs[s].name));
    }
    compare(results, scores);
    note_floor(results, file.monitor());
    return results;
}

}  // namespace turboquant::measure
