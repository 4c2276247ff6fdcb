// Long texts with needles in them: numbers to remember at given depths, and the questions that ask for them. No model is needed here.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "turboquant/codec/random.h"

namespace turboquant::measure {

/// The wording. {word} and {number} are replaced.
struct NeedleTemplate {
    std::string prefix;  ///< before the text
    std::string needle = "\nRemember this: the secret number of {word} is {number}.\n";
    std::string question = "\n\nQuestion: What is the secret number of {word}?\nAnswer: The secret number of {word} is";
    int answer_digits = 5;
    std::vector<std::string> words{"amber",   "basalt",  "cedar",  "dune",   "ember",  "fjord", "garnet", "harbor", "iris",
                                   "juniper", "kestrel", "lagoon", "meadow", "nectar", "onyx",  "pepper", "quartz", "raven",
                                   "saffron", "thistle", "umber",  "violet", "willow", "xenon", "yarrow", "zephyr"};
};

/// Reads a template from JSON: an object with any of the keys "prefix", "needle", "question" (texts), "answer_digits" (3 to 9) and "words"
/// (a list of texts); what it leaves out stays as above. Throws Error naming the file and the key that is wrong.
NeedleTemplate read_needle_template(const std::string& path);

struct Needle {
    std::string word, number;
    double depth = 0;  ///< wanted place, 0 (start) to 1 (end)
};

/// Tokens of a text, as the model will see it.
using CountTokens = std::function<std::size_t(const std::string&)>;

/// One haystack: needles with words and numbers of their own at some depths, so that each is a distractor to the others.
class Haystack {
  public:
    /// Draws words, numbers and the text's beginning. depths: ascending, at most as many as there are words. `words` must outlive this
    /// object.
    Haystack(const NeedleTemplate& words, const std::vector<double>& depths, SplitMix64& random);

    /// From the first depth to the last.
    const std::vector<Needle>& needles() const { return needles_; }
    /// What follows the text to ask for needle i.
    std::string question(std::size_t i) const;

    /// The haystack of `bytes` bytes of text and the needles between: each at the end of a sentence or line near its depth; where there is
    /// none nearer than a quarter of the distance between depths, between words; else between characters. The text is taken from an offset
    /// that was drawn, ends with a whole sentence, and is repeated as often as it takes.
    std::string fill(std::string_view text, std::size_t bytes) const;
    /// The longest such haystack found that has at most max_tokens tokens (within 1 % or 8 tokens, if the text allows). Needles alone must
    /// fit: count(fill(text, 0)) <= max_tokens. bytes: receives the size of the text in it.
    std::string fit(std::string_view text, std::size_t max_tokens, const CountTokens& count, std::size_t& bytes) const;

  private:
    std::string needle_text(const Needle& n) const;

    const NeedleTemplate* template_;
    std::vector<Needle> needles_;
    double start_;  ///< beginning, as a share of the places where it can be
};

}  // namespace turboquant::measure
