// Trains the levels of the trellis codecs and measures them: the tables of turboquant/codec/trellis.cpp and docs/trellis.md.
//
//   c++ -std=c++20 -O3 -march=native -I. scripts/train_trellis.cpp build/lib/libturboquant.a -o train_trellis && ./train_trellis 7 7
//
// Lloyd's iteration: encode random unit vectors by Viterbi search, replace each level by the mean of its values (averaged with its mirror
// image), repeat; then round to the int8 grid whose step costs least.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "turboquant/codec/codebook.h"
#include "turboquant/codec/random.h"
#include "turboquant/codec/trellis.h"

namespace tq = turboquant;

constexpr int kDim = 128, kTrain = 2000, kTest = 4000, kRounds = 30;

static std::vector<float> unit_vectors(int n, std::uint64_t seed) {
    tq::SplitMix64 random(seed);
    std::vector<float> x(static_cast<std::size_t>(n) * kDim);
    for (int i = 0; i < n; ++i) {
        double square = 0;
        for (int d = 0; d < kDim; ++d) x[i * kDim + d] = static_cast<float>(random.normal()), square += x[i * kDim + d] * x[i * kDim + d];
        for (int d = 0; d < kDim; ++d) x[i * kDim + d] /= static_cast<float>(std::sqrt(square));
    }
    return x;
}

// A trellis with float levels (in units of sigma) while training.
static tq::TrellisCodebook with_levels(int bits, int memory, const std::vector<double>& levels) {
    std::vector<std::int8_t> i8(levels.size());
    for (std::size_t k = 0; k < i8.size(); ++k) i8[k] = static_cast<std::int8_t>(k) - static_cast<std::int8_t>(i8.size() / 2);
    tq::TrellisCodebook t = tq::make_trellis(bits, kDim, memory, i8, 1);
    for (std::size_t k = 0; k < levels.size(); ++k) t.centroids[k] = static_cast<float>(levels[k] / std::sqrt(kDim));
    const double gap = t.centroids[levels.size() / 2] * 2;
    t.cost_scale = static_cast<float>(8 / (gap * gap));
    return t;
}

// Mean squared error of unit vectors; sums and counts per level if asked for.
static double encode_all(const tq::TrellisCodebook& t, const std::vector<float>& x, std::vector<double>* sum = nullptr,
                         std::vector<double>* count = nullptr, double* ns = nullptr) {
    std::vector<std::uint8_t> codes(kDim), levels(kDim);
    double error = 0;
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t o = 0; o < x.size(); o += kDim) {
        tq::trellis_encode(t, {x.data() + o, kDim}, codes);
        tq::trellis_levels(t, codes, levels);
        for (int d = 0; d < kDim; ++d) {
            error += std::pow(x[o + d] - t.centroids[levels[d]], 2);
            if (sum) (*sum)[levels[d]] += x[o + d] * std::sqrt(kDim), ++(*count)[levels[d]];
        }
    }
    if (ns) *ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() * kDim / x.size();
    return error * kDim / x.size();
}

int main(int argc, char** argv) {
    const int first = argc > 1 ? std::atoi(argv[1]) : 3, last = argc > 2 ? std::atoi(argv[2]) : 8;  // logarithm of the state count
    const std::vector<float> train = unit_vectors(kTrain, 1), test = unit_vectors(kTest, 2);
    for (int bits = tq::kTrellisMinBits; bits <= tq::kTrellisMaxBits; ++bits)
        for (int memory = first; memory <= last; ++memory) {
            const tq::Codebook start = tq::solve_gaussian_codebook(bits + 1);
            std::vector<double> levels(start.centroids.begin(), start.centroids.end()), count;
            const std::size_t n = levels.size(), half = n / 2;
            for (int round = 0; round < kRounds; ++round) {
                std::vector<double> sum(n);
                count.assign(n, 0);
                encode_all(with_levels(bits, memory, levels), train, &sum, &count);
                for (std::size_t k = half; k < n; ++k) {
                    const double both = count[k] + count[n - 1 - k];
                    if (both > 0) levels[k] = (sum[k] - sum[n - 1 - k]) / both;
                    levels[n - 1 - k] = -levels[k];
                }
            }
            double best = 1e9, step = 0;
            for (double top = 90; top <= 127; top += 0.05) {
                double loss = 0;
                for (std::size_t k = half; k < n; ++k) {
                    const double s = levels.back() / top, e = levels[k] - s * std::round(levels[k] / s);
                    loss += e * e * count[k];
                }
                if (loss < best) best = loss, step = levels.back() / top;
            }
            std::vector<std::int8_t> i8(n);
            for (std::size_t k = 0; k < n; ++k) i8[k] = static_cast<std::int8_t>(std::lround(levels[k] / step));
            const tq::TrellisCodebook rounded = tq::make_trellis(bits, kDim, memory, i8, static_cast<float>(step));
            double ns;
            const double error = encode_all(with_levels(bits, memory, levels), test),
                         error_i8 = encode_all(rounded, test, nullptr, nullptr, &ns);
            std::printf("%d bits, %3d states: error %.5f, int8 levels %.5f, scalar encoder %.0f ns; step %.6f levels", bits, 1 << memory,
                        error, error_i8, ns, step);
            for (std::size_t k = half; k < n; ++k) std::printf(" %d", i8[k]);
            std::printf("\n");
            std::fflush(stdout);
        }
}
