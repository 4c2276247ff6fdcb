// Perplexity and KL divergence of next-token distributions, defined as llama.cpp's llama-perplexity defines them, but from full float32
// logits on both sides (llama-perplexity stores the reference's in 16 bits and leaves out tokens below e^-16).
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace turboquant::measure {

struct TokenScore {
    double kld = 0;      ///< KL(P_ref || P) in nats, over the whole vocabulary
    double tv = 0;       ///< total variation, 1/2 sum |P_ref - P|: the share of sampled tokens that would differ at best
    double nll = 0;      ///< -ln P(target)
    double nll_ref = 0;  ///< -ln P_ref(target)
    bool same_top = false;
};

/// Scores one position. `ref` and `logits`: n_vocab raw logits each; target: the token that follows in the text. Arithmetic in double.
TokenScore score_token(std::span<const float> ref, std::span<const float> logits, int target);

/// Quantile of ascending values, linear between neighbours: at fraction*(n-1). Values must not be empty.
double quantile(std::span<const double> ascending, double fraction);

struct ScoreSummary {
    double ppl = 0, ppl_ref = 0;
    double mean_kld = 0, median_kld = 0, kld_99 = 0, kld_999 = 0;
    double mean_kld_error = 0;  ///< standard error (mean_error)
    double overlap = 0;         ///< mean of one minus the total variation, 0..1
    double same_top = 0;        ///< share of positions, 0..1
    std::size_t tokens = 0;
};

/// All zero for no scores. NaN in, NaN out.
ScoreSummary summarize(std::span<const TokenScore> scores);

struct MeanError {
    double mean = 0, error = 0;
};
/// Positions of a block of mean_error, at most.
inline constexpr std::size_t kErrorBlock = 32;
/// Mean and standard error of values at consecutive positions. Neighbours are alike (a hard passage is hard for many tokens), so positions are
/// not independent and an error over single ones is too small; that over the sums of blocks of kErrorBlock is not ("batch means"; with few
/// positions shorter blocks, so that there are eight). Blocks, not whole chunks: one or two chunks would leave nothing to estimate from.
MeanError mean_error(std::span<const double> values);

/// Of KLD(a) - KLD(b), position by position: both were scored on the same ones, so what is hard for both falls out.
MeanError paired_difference(std::span<const TokenScore> a, std::span<const TokenScore> b);

}  // namespace turboquant::measure
