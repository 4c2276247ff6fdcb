#include "turboquant/measure/haystack.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "turboquant/llama/error.h"
#include "turboquant/llama/text.h"

namespace turboquant::measure {
namespace {

/// `text` with every {name} replaced.
std::string replaced(std::string text, std::string_view name, std::string_view by) {
    for (std::size_t at = 0; (at = text.find(name, at)) != text.npos; at += by.size()) text.replace(at, name.size(), by);
    return text;
}

bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

// Where a needle may stand, the best kind first.
bool after_sentence(std::string_view text, std::size_t at) {
    constexpr std::string_view kEnds[] = {".", "!", "?", "…", ".\"", "!\"", "?\"", ".”", "!”", "?”"}, kWideEnds[] = {"。", "！", "？"};
    const std::string_view before = text.substr(0, at);
    const auto ends = [&](std::string_view end) { return before.ends_with(end); };
    if (at == 0 || at == text.size() || text[at - 1] == '\n') return true;
    return ((text[at] == ' ' || text[at] == '\n') && std::ranges::any_of(kEnds, ends)) || std::ranges::any_of(kWideEnds, ends);
}
bool before_space(std::string_view text, std::size_t at) { return at == text.size() || text[at] == ' '; }
bool before_character(std::string_view text, std::size_t at) { return at == text.size() || (text[at] & 0xc0) != 0x80; }  // UTF-8

/// The place nearest to `at`, at most `limit` bytes away if it is one of the better kinds.
std::size_t nearest_place(std::string_view text, std::size_t at, std::size_t limit) {
    at = std::min(at, text.size());
    for (const auto fits : {after_sentence, before_space, before_character})
        for (std::size_t d = 0; d <= (fits == before_character ? text.size() : limit); d++) {
            if (at >= d && fits(text, at - d)) return at - d;
            if (at + d <= text.size() && fits(text, at + d)) return at + d;
        }
    return at;
}

}  // namespace

NeedleTemplate read_needle_template(const std::string& path) {
    using nlohmann::json;
    const auto fail = [&](const std::string& what) { return llama::Error(fmt::format("needle template '{}': {}", path, what)); };
    const json j = json::parse(llama::read_text_file(path), nullptr, /*allow_exceptions=*/false);
    if (!j.is_object())
        throw fail(R"(no JSON object; write one such as {"needle": "... {word} ... {number} ...", "question": "... {word} ..."})");
    NeedleTemplate t;
    for (const auto& [key, value] : j.items()) {
        if (std::string* text = key == "prefix" ? &t.prefix : key == "needle" ? &t.needle : key == "question" ? &t.question : nullptr) {
            if (!value.is_string()) throw fail(fmt::format("\"{}\" must be a text", key));
            *text = value;
        } else if (key == "answer_digits") {
            if (!value.is_number_integer() || value < 3 || value > 9) throw fail("\"answer_digits\" must be a number from 3 to 9");
            t.answer_digits = value;
        } else if (key == "words") {
            std::set<std::string> words;
            for (const json& word : value)
                if (word.is_string() && !word.get<std::string>().empty()) words.insert(word);
            if (!value.is_array() || words.empty() || words.size() != value.size())
                throw fail("\"words\" must be a list of texts, all different");
            t.words.assign(words.begin(), words.end());
        } else {
            throw fail(fmt::format("unknown key \"{}\"; known are prefix, needle, question, answer_digits and words", key));
        }
    }
    for (const char* name : {"{word}", "{number}"})
        if (!has(t.needle, name)) throw fail(fmt::format("\"needle\" lacks {}", name));
    if (!has(t.question, "{word}")) throw fail("\"question\" lacks {word}");
    if (has(t.question, "{number}")) throw fail("\"question\" tells the answer: remove {number}");
    return t;
}

Haystack::Haystack(const NeedleTemplate& words, const std::vector<double>& depths, SplitMix64& random) : template_(&words) {
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random.bits() % n); };
    std::vector<std::string> left = words.words;
    std::set<std::string> used;
    for (const double depth : depths) {
        Needle n{.word = {}, .number = {}, .depth = depth};
        std::swap(left[below(left.size())], left.back());
        n.word = std::move(left.back());
        left.pop_back();
        do {  // a number that two needles share could be found at the wrong one
            n.number = static_cast<char>('1' + below(9));
            while (n.number.size() < static_cast<std::size_t>(words.answer_digits)) n.number += static_cast<char>('0' + below(10));
        } while (!used.insert(n.number).second);
        needles_.push_back(std::move(n));
    }
    start_ = random.uniform();
}

std::string Haystack::question(std::size_t i) const { return replaced(template_->question, "{word}", needles_[i].word); }

std::string Haystack::needle_text(const Needle& n) const {
    return replaced(replaced(template_->needle, "{word}", n.word), "{number}", n.number);
}

std::string Haystack::fill(std::string_view text, std::size_t bytes) const {
    constexpr std::size_t kFewBytes = 200;  // most sentences are shorter
    const auto places = static_cast<double>(bytes < text.size() ? text.size() - bytes : text.size());
    std::size_t at = nearest_place(text, static_cast<std::size_t>(start_ * places), kFewBytes);
    std::string body;
    while (body.size() < bytes && !text.empty()) {
        if (!body.empty()) body += "\n\n";
        body += text.substr(at, bytes - std::min(bytes, body.size()));
        at = 0;
    }
    std::size_t end = std::min(bytes, body.size());
    body += ' ';  // its end counts as a sentence's only if it is one
    for (std::size_t d = 0; d <= std::min(end / 4, kFewBytes); d++)
        if (after_sentence(body, end - d)) {
            end -= d;
            break;
        }
    while (!before_character(body, end)) end--;
    body.resize(end);

    std::string out = template_->prefix;
    std::size_t done = 0;
    for (const Needle& n : needles_) {
        const auto wanted = static_cast<std::size_t>(std::lround(n.depth * static_cast<double>(body.size())));
        const std::size_t place = std::max(done, nearest_place(body, wanted, body.size() / (4 * needles_.size())));
        out += body.substr(done, place - done) + needle_text(n);
        done = place;
    }
    return out + body.substr(done);
}

std::string Haystack::fit(std::string_view text, std::size_t max_tokens, const CountTokens& count, std::size_t& bytes) const {
    std::string best = fill(text, 0);
    const std::size_t n_needles = count(best);
    bytes = 0;
    // Tokens grow almost in proportion to bytes: a few guesses do, between the largest size that fits and the smallest that does not.
    std::size_t low = 0, high = static_cast<std::size_t>(-1), guess = 4 * (max_tokens - std::min(max_tokens, n_needles));
    for (int i = 0; i < 20 && guess > low && guess < high; i++) {
        std::string s = fill(text, guess);
        const std::size_t n = count(s);
        if (n > max_tokens) {
            high = guess;
        } else {
            best = std::move(s), bytes = low = guess;
            if (n + std::max<std::size_t>(8, max_tokens / 100) >= max_tokens) break;
        }
        const double per_token = static_cast<double>(guess) / static_cast<double>(std::max(n, n_needles + 1) - n_needles);
        guess = static_cast<std::size_t>(per_token * (static_cast<double>(max_tokens - n_needles) - 3));
        if (max_tokens < n_needles + 3 || guess <= low || guess >= high) guess = low + (high - low) / 2;
    }
    return best;
}

}  // namespace turboquant::measure
