// The statistics of `turboquant eval` on hand-made logits, against closed forms.
#include "turboquant/measure/score.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "turboquant/codec/random.h"

namespace turboquant::measure {
namespace {

float ln(double p) { return static_cast<float>(std::log(p)); }

TEST(Score, KnownDistributions) {
    // P_ref = (1/2, 1/4, 1/4), P = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2 = 1/4 ln 2. Logits are free up to a constant.
    const std::vector<float> ref{ln(0.5) + 3, ln(0.25) + 3, ln(0.25) + 3}, l{ln(0.25) - 40, ln(0.5) - 40, ln(0.25) - 40};
    const TokenScore s = score_token(ref, l, 1);
    EXPECT_NEAR(s.kld, 0.25 * std::log(2.0), 1e-5);
    EXPECT_NEAR(s.nll, -std::log(0.5), 1e-5);
    EXPECT_NEAR(s.nll_ref, -std::log(0.25), 1e-5);
    EXPECT_NEAR(s.tv, 0.25, 1e-6) << "1/2 (1/4 + 1/4 + 0)";
    EXPECT_FALSE(s.same_top);
}

TEST(Score, KlIsNotSymmetric) {
    const std::vector<float> a{ln(0.9), ln(0.1)}, b{ln(0.5), ln(0.5)};
    EXPECT_NEAR(score_token(a, b, 0).kld, 0.9 * std::log(1.8) + 0.1 * std::log(0.2), 1e-6);
    EXPECT_NEAR(score_token(b, a, 0).kld, 0.5 * std::log(0.5 / 0.9) + 0.5 * std::log(0.5 / 0.1), 1e-6);
}

TEST(Score, SameLogitsGiveExactlyZero) {
    std::vector<float> l(1000);
    for (std::size_t i = 0; i < l.size(); i++) l[i] = 30 * std::sin(static_cast<float>(i));
    const TokenScore s = score_token(l, l, 17);
    EXPECT_EQ(s.kld, 0);
    EXPECT_EQ(s.nll, s.nll_ref);
    EXPECT_TRUE(s.same_top);
}

TEST(Score, ShiftChangesNothingAndHugeLogitsDoNotOverflow) {
    const std::vector<float> a{1, 2, 3}, b{3, 1, 2};
    std::vector<float> far(b);
    for (float& x : far) x += 8192;
    EXPECT_NEAR(score_token(a, b, 0).kld, score_token(a, far, 0).kld, 1e-9);
    EXPECT_NEAR(score_token(a, b, 0).nll, score_token(a, far, 0).nll, 1e-9);
    const double kld = score_token(std::vector<float>{20000, 0}, std::vector<float>{0, 20000}, 0).kld;
    EXPECT_NEAR(kld, 20000, 1);
}

TEST(Score, BannedTokensCountNothing) {
    // A logit of -inf on both sides (a masked token) has probability 0 and must not make the sum NaN.
    const float inf = std::numeric_limits<float>::infinity();
    const std::vector<float> a{0, 1, -inf}, b{1, 0, -inf};
    const double p = 1 / (1 + std::exp(1.0));
    EXPECT_NEAR(score_token(a, b, 0).kld, (1 - p) - p, 1e-6);
}

TEST(Score, QuantileInterpolates) {
    const std::vector<double> v{0, 1, 2, 3, 10};
    EXPECT_EQ(quantile(v, 0), 0);
    EXPECT_EQ(quantile(v, 1), 10);
    EXPECT_EQ(quantile(v, 0.5), 2);
    EXPECT_NEAR(quantile(v, 0.9), 3 + 0.6 * 7, 1e-12);
    EXPECT_EQ(quantile(std::vector<double>{4}, 0.99), 4);
}

TEST(Score, Summary) {
    std::vector<TokenScore> scores(1001);
    for (std::size_t i = 0; i < scores.size(); i++) scores[i] = {static_cast<double>(i), 0.25, std::log(8.0), std::log(4.0), i % 7 != 0};
    std::reverse(scores.begin(), scores.end());
    const ScoreSummary s = summarize(scores);
    EXPECT_NEAR(s.ppl, 8, 1e-9);
    EXPECT_NEAR(s.ppl_ref, 4, 1e-9);
    EXPECT_NEAR(s.mean_kld, 500, 1e-9);
    EXPECT_NEAR(s.median_kld, 500, 1e-9);
    EXPECT_NEAR(s.kld_99, 990, 1e-9);
    EXPECT_NEAR(s.kld_999, 999, 1e-9);
    EXPECT_NEAR(s.overlap, 0.75, 1e-12);
    EXPECT_NEAR(s.same_top, 858.0 / 1001, 1e-12);
    EXPECT_EQ(s.tokens, 1001u);
}

/// A random walk forgotten at the rate 1 - keep, with unit variance: neighbours are correlated by `keep`.
std::vector<double> correlated(std::size_t n, double keep, unsigned seed) {
    SplitMix64 random(seed);
    std::vector<double> x(n);
    double at = random.normal();
    for (double& v : x) v = at = keep * at + std::sqrt(1 - keep * keep) * random.normal();
    return x;
}

TEST(Score, StandardErrorIsThatOfManyTexts) {
    // Against what it estimates: how far means of as many positions scatter from text to text.
    for (const double keep : {0.0, 0.6}) {
        double squares = 0, estimated = 0;
        constexpr int kTexts = 400;
        for (unsigned t = 0; t < kTexts; t++) {
            const MeanError m = mean_error(correlated(1024, keep, t + 1));
            squares += m.mean * m.mean, estimated += m.error;
        }
        EXPECT_NEAR(estimated / kTexts / std::sqrt(squares / kTexts), 1, 0.12) << keep;
    }
    // Over single positions it would be 1/32, half of that.
    EXPECT_GT(mean_error(correlated(1 << 16, 0.6, 1)).error, 1.7 / 256);
    EXPECT_EQ(mean_error(std::vector<double>{3}).error, 0);
    EXPECT_EQ(mean_error({}).mean, 0);
}

TEST(Score, PairedDifferencesLeaveOutWhatIsHardForBoth) {
    const std::vector<double> hard = correlated(1024, 0.5, 1), own = correlated(1024, 0, 2);
    std::vector<TokenScore> a(1024), b(1024);
    for (std::size_t i = 0; i < a.size(); i++) a[i].kld = 10 + hard[i] + 0.3, b[i].kld = 10 + hard[i] + 0.1 * own[i];
    const MeanError d = paired_difference(a, b);
    EXPECT_NEAR(d.mean, 0.3, 4 * 0.1 / 32);
    EXPECT_NEAR(d.error, 0.1 / 32, 0.001);
    EXPECT_GT(summarize(a).mean_kld_error, 10 * d.error);
}

TEST(Score, NanIsNotHidden) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<TokenScore> scores{score_token(std::vector<float>{0, 1, 2}, std::vector<float>{0, nan, 2}, 0)};
    EXPECT_TRUE(std::isnan(summarize(scores).mean_kld));
}

}  // namespace
}  // namespace turboquant::measure
