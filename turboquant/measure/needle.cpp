#include "turboquant/measure/needle.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "fmt/format.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/session.h"
#include "turboquant/llama/text.h"
#include "turboquant/measure/haystack.h"
#include "turboquant/measure/kv_resolve.h"

namespace turboquant::measure {
namespace {

/// Depth i of n, from 0 to 1.
double depth_at(int i, int n) { return n == 1 ? 0.5 : static_cast<double>(i) / (n - 1); }

/// Depths (as indices) of the needles in each haystack: so many that every depth is asked o.needles times in all, few enough in each that
/// they do not drown each other (with ten in a text, small models mix them up whatever the cache).
std::vector<std::vector<int>> depths_of_haystacks(const NeedleOptions& o) {
    const int each = std::min(o.needles, o.depths);
    std::vector<std::vector<int>> all(static_cast<std::size_t>(o.needles < o.depths ? o.depths : o.needles));
    for (std::size_t i = 0; i < all.size(); i++) {
        for (int k = 0; k < each; k++) all[i].push_back((static_cast<int>(i) + k * o.depths / each) % o.depths);
        std::ranges::sort(all[i]);
    }
    return all;
}

/// A haystack in tokens, with one question per needle.
struct Prompts {
    std::vector<int> depths;                       ///< of the needles, as indices
    std::vector<std::vector<llama_token>> tokens;  ///< the whole prompt of each question
    std::vector<std::string> answers;
    std::size_t common = 0;  ///< leading tokens that all have
    std::size_t longest = 0, shortest = 0;
};

/// Tokens of a prompt: without the end token that some tokenizers add.
std::vector<llama_token> prompt_tokens(const llama_vocab* vocab, const std::string& text) {
    std::vector<llama_token> tokens = llama::tokenize(vocab, text, true);
    if (llama_vocab_get_add_eos(vocab) && tokens.back() == llama_vocab_eos(vocab)) tokens.pop_back();
    return tokens;
}

// Haystack and question are one text to the tokenizer, as they are in use: tokens may join at the seam.
Prompts make_prompts(const llama_vocab* vocab, const Haystack& haystack, const std::vector<int>& depths, const std::string& text) {
    Prompts p;
    p.depths = depths;
    for (std::size_t i = 0; i < haystack.needles().size(); i++) {
        p.tokens.push_back(prompt_tokens(vocab, text + haystack.question(i)));
        p.answers.push_back(haystack.needles()[i].number);
        const auto &first = p.tokens.front(), &last = p.tokens.back();
        const auto differ = static_cast<std::size_t>(std::ranges::mismatch(first, last).in1 - first.begin());
        p.common = i == 0 ? differ : std::min(p.common, differ);
        p.longest = std::max(p.longest, last.size());
        p.shortest = i == 0 ? last.size() : std::min(p.shortest, last.size());
    }
    return p;
}

struct Text {
    std::string words, file;
};

/// The haystacks of one context, as long as fit beside question and answer. Throws Error if the needles alone do not.
std::vector<Prompts> make_haystacks(const llama_vocab* vocab, const Text& text, const NeedleTemplate& words, const NeedleOptions& o,
                                    int n_ctx, const llama::Monitor& monitor) {
    const std::size_t answer = static_cast<std::size_t>(words.answer_digits) + 3;  // a token per digit, and some space before
    const auto room = static_cast<std::size_t>(n_ctx) - std::min(answer, static_cast<std::size_t>(n_ctx));
    SplitMix64 random(o.seed);
    std::vector<Haystack> haystacks;
    std::size_t least = 0;
    const std::vector<std::vector<int>> depths = depths_of_haystacks(o);
    for (const std::vector<int>& indices : depths) {
        std::vector<double> places;
        for (const int i : indices) places.push_back(depth_at(i, o.depths));
        haystacks.emplace_back(words, places, random);
        least = std::max(least, make_prompts(vocab, haystacks.back(), indices, haystacks.back().fill(text.words, 0)).longest);
    }
    if (least > room)
        throw llama::Error(
            fmt::format("a context of {} tokens is too small: {} needles, a question and its answer take {}; use --ctx {} or "
                        "more, or fewer --needles",
                        n_ctx, depths[0].size(), least + answer, least + answer));
    std::vector<Prompts> all;
    std::size_t bytes = 0, most = 0;
    for (std::size_t i = 0; i < haystacks.size(); i++) {
        const Haystack& h = haystacks[i];
        const CountTokens count = [&](const std::string& s) { return prompt_tokens(vocab, s + h.question(0)).size(); };
        std::size_t max_tokens = room;
        for (;;) {  // the questions' lengths differ by a token or two
            all.push_back(make_prompts(vocab, h, depths[i], h.fit(text.words, max_tokens, count, bytes)));
            if (all.back().longest <= room) break;
            max_tokens -= all.back().longest - room;
            all.pop_back();
        }
        most = std::max(most, bytes);
    }
    if (most > text.words.size())
        monitor.note(fmt::format("warning: text file '{}' is too short for a context of {} tokens; it is repeated {:.1f} times", text.file,
                                 n_ctx, static_cast<double>(most) / static_cast<double>(text.words.size())));
    return all;
}

/// Decodes a prompt from token `from` on; returns the logits after the last one.
const float* decode_from(llama::Session& session, std::span<const llama_token> tokens, std::size_t from, llama::Work& work) {
    const int end = static_cast<int>(tokens.size());
    const float* last = nullptr;
    session.feed(tokens, static_cast<int>(from), end - 1, end, 0, &work, [&](int, int, const float* logits) { last = logits; });
    return last;
}

/// Whether greedy text after `logits` begins with the answer; stops as soon as that is decided.
bool answers(llama::Session& session, const float* logits, int pos, const std::string& answer) {
    std::string text;
    for (std::size_t i = 0; i < answer.size() + 3; i++) {
        const auto token = static_cast<llama_token>(std::max_element(logits, logits + session.n_vocab()) - logits);
        if (llama_vocab_is_eog(session.vocab(), token)) return false;
        text += llama::token_text(session.vocab(), token);
        text.erase(0, std::min(text.find_first_not_of(" \t\n"), text.size()));
        if (text.starts_with(answer)) return true;
        if (!answer.starts_with(text)) return false;
        logits = session.decode({&token, 1}, pos, pos, pos + 1);
        pos++;
    }
    return false;
}

/// Asks all questions of a haystack; adds to found[d] if the needle at depth d was told. The haystack is decoded once: each question is
/// decoded behind it and removed again with its answer.
///
/// Every question must find the cache in the same state. Ours keeps the most recent tokens exactly, and a sequence that is cut back finds
/// the tokens before the cut compressed. So the first question, too, begins with a cut; and the cut is made early enough for the window of
/// recent tokens to be full again where the answer begins, as it would be had the prompt been decoded at once.
void ask_all(llama::Session& session, const Prompts& p, llama::Work& work, std::vector<int>& found) {
    const auto& ours = session.spec().ours;
    const int recent = ours ? ours->windows.resolve(llama_n_ctx(session.context())).recent : 0;
    const std::size_t at = std::min(p.common, p.shortest - std::clamp<std::size_t>(recent, 1, p.shortest));
    session.clear();
    decode_from(session, p.tokens[0], 0, work);
    for (std::size_t i = 0; i < p.tokens.size(); i++) {
        const bool cut = session.cut(static_cast<int>(at));
        if (!cut) session.clear();
        const float* logits = decode_from(session, p.tokens[i], cut ? at : 0, work);
        found[p.depths[i]] += answers(session, logits, static_cast<int>(p.tokens[i].size()), p.answers[i]);
    }
}

}  // namespace

double depth_percent(std::size_t i, std::size_t n) { return std::round(10000 * depth_at(static_cast<int>(i), static_cast<int>(n))) / 100; }

std::vector<NeedleResult> search_needles(llama::ModelFile& file, NeedleOptions o) {
    const KvArguments arguments(o.kv, o.windows);
    const NeedleTemplate words = o.template_file.empty() ? NeedleTemplate{} : read_needle_template(o.template_file);
    if (const int most = std::min(o.needles, o.depths); static_cast<std::size_t>(most) > words.words.size())
        throw llama::Error(
            fmt::format("{} needles in a text need as many different words, and there are {}; use fewer --needles or --depths, or a "
                        "--template with more \"words\"",
                        most, words.words.size()));
    const Text text{llama::read_text_file(o.text_file), o.text_file};
    if (arguments.need_device()) file.use_device();
    const std::shared_ptr<llama_model> model = file.model();
    const llama_vocab* vocab = llama_model_get_vocab(model.get());
    std::vector<std::vector<Prompts>> haystacks;
    for (const int n_ctx : o.ctx) haystacks.push_back(make_haystacks(vocab, text, words, o, n_ctx, file.monitor()));
    const int largest = *std::ranges::max_element(o.ctx);
    if (const int trained = llama_model_n_ctx_train(model.get()); trained < largest)
        file.monitor().note(fmt::format("warning: the model was trained on contexts of {} tokens only", trained));
    file.monitor().note(fmt::format("model {}: {} texts per context with {} needles each, {} questions at each of {} depths, seed {}",
                                    file.path(), haystacks[0].size(), haystacks[0][0].answers.size(), o.needles, o.depths, o.seed));

    std::vector<NeedleResult> results;
    for (const llama::CacheSpec& spec : arguments.resolve(file, largest, {.calib_file = o.calib_file, .n_threads = o.context.n_threads})) {
        for (std::size_t c = 0; c < o.ctx.size(); c++) {
            o.context.n_ctx = o.ctx[c];
            llama::Session session(file, spec, o.context);
            file.monitor().note(fmt::format("{}; greedy", session.config()));
            const double questions = 40.0 * o.depths * o.needles;  // tokens, about: for the bar
            llama::Work work(file.monitor(), fmt::format("needle {} {}", spec.name, o.ctx[c]),
                             static_cast<double>(haystacks[c].size()) * o.ctx[c] + questions);
            NeedleResult r{spec.name, o.ctx[c], std::vector<int>(static_cast<std::size_t>(o.depths)), o.needles};
            for (const Prompts& p : haystacks[c]) ask_all(session, p, work, r.found);
            results.push_back(std::move(r));
        }
    }
    return results;
}

}  // namespace turboquant::measure
