#include "turboquant/codec/codebook.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "support.h"

namespace turboquant {
namespace {

// An integrator of the test's own (Simpson in t), so that the solver is not checked with its own arithmetic. d = 0: N(0,1).
struct Cell {
    double mass = 0, mean = 0;
};

double density(int d, double t) { return d ? std::pow(std::max(0.0, 1 - t * t), (d - 3) / 2.0) : std::exp(-t * t / 2); }
double far_end(int d) { return d ? std::min(1.0, 12 / std::sqrt(d)) : 12; }

Cell simpson(int d, double lo, double hi) {
    const double sigma = d ? 1 / std::sqrt(d) : 1;
    const int n = 2 * (20 + static_cast<int>((hi - lo) / sigma * 200));
    Cell cell;
    double first = 0;
    for (int i = 0; i <= n; ++i) {
        const double t = lo + (hi - lo) * i / n, w = (i == 0 || i == n ? 1 : i % 2 ? 4 : 2) * density(d, t) * (hi - lo) / (3 * n);
        cell.mass += w;
        first += w * t;
    }
    cell.mean = first / cell.mass;
    return cell;
}

double edge(const Codebook& book, std::size_t i) {  // i = 0..levels
    if (i == 0) return -far_end(book.head_dim);
    return i == book.centroids.size() ? far_end(book.head_dim) : book.boundaries[i - 1];
}

// The Lloyd conditions, to the precision of the floats that hold the table.
void expect_converged(const Codebook& book) {
    const double sigma = book.head_dim ? 1 / std::sqrt(book.head_dim) : 1;
    EXPECT_LT(book.residual, 1e-12);  // before rounding to float
    ASSERT_EQ(book.centroids.size(), std::size_t{1} << book.bits);
    ASSERT_EQ(book.boundaries.size(), book.centroids.size() - 1);
    for (std::size_t i = 0; i < book.centroids.size(); ++i) {
        const double c = book.centroids[i];
        EXPECT_EQ(c, -book.centroids[book.centroids.size() - 1 - i]) << "not mirrored exactly";
        const double ulp = 1.2e-7 * std::max(std::abs(c), 0.2 * sigma);
        EXPECT_NEAR(c, simpson(book.head_dim, edge(book, i), edge(book, i + 1)).mean, 1e-9 * sigma + ulp) << "level " << i;
        if (i == 0) continue;
        EXPECT_LT(book.centroids[i - 1], c);
        EXPECT_NEAR(book.boundaries[i - 1], (c + book.centroids[i - 1]) / 2, ulp);
        EXPECT_EQ(book.boundaries[i - 1], -book.boundaries[book.boundaries.size() - i]);
    }
}

TEST(Codebook, ConvergedForEverySizeAndWidth) {
    for (int d : kHeadDims)
        for (int bits = 1; bits <= 8; ++bits) {
            SCOPED_TRACE("bits " + std::to_string(bits) + " head_dim " + std::to_string(d));
            expect_converged(solve_codebook(bits, d));
        }
    for (int bits = 1; bits <= 8; ++bits) expect_converged(solve_gaussian_codebook(bits));
    for (int bits : {1, 4, 8}) expect_converged(solve_codebook(bits, 8));
}

TEST(Codebook, SphereErrorAt128) {
    const double known[] = {.3609, .1160, .03397, .00932};
    for (int bits = 1; bits <= 4; ++bits) EXPECT_NEAR(solve_codebook(bits, 128).mse, known[bits - 1], known[bits - 1] * 1e-3);
}

TEST(Codebook, GaussianErrorMatchesPublished) {
    const double known[] = {.36338, .117482, .034548, .009501, .00251, .00064};
    const double tolerance[] = {1e-5, 1e-6, 1e-6, 1e-6, 1e-5, 1e-5};
    for (int bits = 1; bits <= 6; ++bits) EXPECT_NEAR(solve_gaussian_codebook(bits).mse, known[bits - 1], tolerance[bits - 1]);
}

TEST(Codebook, GaussianLevelsMatchConvergedTables) {
    const std::vector<std::vector<double>> tables{
        {.040020, .133503}, {.021663, .066822, .118786, .190207}, {.011349, .034299, .058050, .083292, .111036, .143016, .182877, .241529}};
    for (int bits = 2; bits <= 4; ++bits) {
        const Codebook book = solve_gaussian_codebook(bits);
        const auto& table = tables[bits - 2];
        for (std::size_t k = 0; k < table.size(); ++k) EXPECT_NEAR(book.centroids[table.size() + k] / std::sqrt(128.0), table[k], 6e-7);
    }
}

TEST(Codebook, QuantizeFindsNearestLevelAndTiesGoUp) {
    for (int bits : {1, 3, 8}) {
        const Codebook& book = codebook_for(bits, 128);
        for (int i = -2000; i <= 2000; ++i) {
            const float t = static_cast<float>(i) / 2000 * 0.5f;
            std::size_t best = 0;
            for (std::size_t k = 1; k < book.centroids.size(); ++k)
                if (std::abs(t - book.centroids[k]) <= std::abs(t - book.centroids[best])) best = k;
            const float chosen = std::abs(t - book.centroids[book.quantize(t)]);
            EXPECT_NEAR(chosen, std::abs(t - book.centroids[best]), 3e-8);
        }
        for (std::size_t k = 0; k < book.boundaries.size(); ++k) EXPECT_EQ(book.quantize(book.boundaries[k]), k + 1);
        EXPECT_EQ(book.quantize(-9), 0u);
        EXPECT_EQ(book.quantize(9), book.centroids.size() - 1);
    }
}

// Rounding the levels to int8 must cost little of the error there is already; but it is not free either.
TEST(Codebook, Int8ImageCostsLessThanHalfAPercent) {
    for (int d : kHeadDims)
        for (int bits = 1; bits <= 4; ++bits) {
            const Codebook& book = codebook_for(bits, d);
            ASSERT_EQ(book.i8.size(), book.centroids.size());
            double loss = 0, mass = 0;
            for (std::size_t k = 0; k < book.i8.size(); ++k) {
                EXPECT_EQ(book.i8[k], -book.i8[book.i8.size() - 1 - k]);
                EXPECT_EQ(book.i8[k], std::lrint(book.centroids[k] / book.i8_step));
                const double p = simpson(d, edge(book, k), edge(book, k + 1)).mass,
                             e = static_cast<double>(book.i8[k]) * book.i8_step - book.centroids[k];
                mass += p;
                loss += p * e * e;
            }
            const double share = d * loss / mass / book.mse;
            EXPECT_LT(share, 0.005) << bits << " bits, head_dim " << d;
            EXPECT_EQ(std::max(-book.i8.front(), 100), -book.i8.front());
            if (d == 128) std::printf("int8 loss: bits %d mse %.6f share %.5f %%\n", bits, book.mse, 100 * share);
        }
    EXPECT_TRUE(codebook_for(5, 128).i8.empty());
}

TEST(Codebook, SolvedOncePerSize) {
    EXPECT_EQ(&codebook_for(4, 128), &codebook_for(4, 128));
    EXPECT_EQ(codebook_for(4, 128).centroids, solve_codebook(4, 128).centroids);
}

TEST(Codebook, RejectsWhatItCannotSolve) {
    EXPECT_THROW(solve_codebook(0, 128), std::invalid_argument);
    EXPECT_THROW(solve_codebook(9, 128), std::invalid_argument);
    EXPECT_THROW(solve_codebook(4, 7), std::invalid_argument);
    EXPECT_THROW(solve_gaussian_codebook(9), std::invalid_argument);
    EXPECT_THROW(codebook_for(0, 128), std::invalid_argument);
}

}  // namespace
}  // namespace turboquant
