#include "turboquant/codec/codebook.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numbers>
#include <stdexcept>
#include <utility>

namespace turboquant {
namespace {

// The density of one coordinate, up to a constant factor: the sphere marginal in R^d, or N(0,1) for d = 0. The sphere is integrated over
// the latitude u = asin(t), in which t-density * dt = cos(u)^(d-2) du is smooth up to the pole ((1-t^2)^((d-3)/2) is not).
struct Law {
    int d;

    double sigma() const { return d ? 1 / std::sqrt(static_cast<double>(d)) : 1; }
    double x(double u) const { return d ? std::sin(u) : u; }
    double u(double t) const { return d ? std::asin(t) : t; }
    double weight(double u) const { return d ? std::pow(std::cos(u), d - 2) : std::exp(-u * u / 2); }
    double density(double t) const { return d ? std::pow(1 - t * t, (d - 3) / 2.0) : std::exp(-t * t / 2); }
    // Beyond 14 sigma the mass is below 1e-40 of the whole.
    double u_max() const { return d ? std::min(std::numbers::pi / 2, 14 * sigma()) : 14; }
};

// Nodes and weights of Gauss-Legendre quadrature on [-1, 1].
constexpr int kNodes = 12;
struct GaussLegendre {
    std::array<double, kNodes> x{}, w{};
    GaussLegendre() {
        for (int i = 0; i < kNodes; ++i) {
            double t = std::cos(std::numbers::pi * (i + 0.75) / (kNodes + 0.5)), slope = 1;
            for (int it = 0; it < 20; ++it) {
                double p0 = 1, p1 = t;
                for (int n = 2; n <= kNodes; ++n) p0 = std::exchange(p1, ((2 * n - 1) * t * p1 - (n - 1) * p0) / n);
                slope = kNodes * (t * p1 - p0) / (t * t - 1);
                t -= p1 / slope;
            }
            x[i] = t;
            w[i] = 2 / ((1 - t * t) * slope * slope);
        }
    }
};

struct Moments {
    double mass = 0, first = 0, second = 0;  // moments about `origin`
};

Moments integrate(const Law& law, double u_lo, double u_hi, double origin) {
    static const GaussLegendre rule;
    const int panels = 1 + static_cast<int>((u_hi - u_lo) / (0.5 * law.sigma()));
    const double half = (u_hi - u_lo) / (2 * panels);
    Moments m;
    for (int p = 0; p < panels; ++p)
        for (int i = 0; i < kNodes; ++i) {
            const double u = u_lo + half * (2 * p + 1 + rule.x[i]), w = half * rule.w[i] * law.weight(u), t = law.x(u) - origin;
            m.mass += w, m.first += w * t, m.second += w * t * t;
        }
    return m;
}

// Starting levels: high-rate theory (Bennett 1948) puts them with density proportional to f^(1/3).
std::vector<double> companding_guess(const Law& law, int m) {
    constexpr int kGrid = 4096;
    std::vector<double> cdf(kGrid + 1), t(kGrid + 1);
    for (int i = 1; i <= kGrid; ++i) {
        t[i] = law.x(law.u_max() * i / kGrid);
        cdf[i] = cdf[i - 1] + std::cbrt(law.density((t[i] + t[i - 1]) / 2)) * (t[i] - t[i - 1]);
    }
    std::vector<double> c(m);
    for (int k = 0; k < m; ++k) {
        const double target = cdf[kGrid] * (k + 0.5) / m;
        const auto i = std::upper_bound(cdf.begin(), cdf.end(), target) - cdf.begin();
        c[k] = t[i - 1] + (t[i] - t[i - 1]) * (target - cdf[i - 1]) / (cdf[i] - cdf[i - 1]);
    }
    return c;
}

// One pass over the cells of the positive half: residual c - E[t | cell] and its Jacobian, which is tridiagonal because a cell's mean
// depends on the level itself and its two neighbours only.
struct Lloyd {
    std::vector<double> residual, lower, diagonal, upper;
    double worst = 0, mass = 0, error = 0;  // error: sum of squared deviations from the levels

    Lloyd(const Law& law, const std::vector<double>& c) : residual(c.size()), lower(c.size()), diagonal(c.size(), 1), upper(c.size()) {
        const int m = static_cast<int>(c.size());
        for (int k = 0; k < m; ++k) {
            const bool first = k == 0, last = k == m - 1;
            const double lo = first ? 0 : (c[k - 1] + c[k]) / 2, hi = last ? 0 : (c[k] + c[k + 1]) / 2;
            const Moments q = integrate(law, law.u(lo), last ? law.u_max() : law.u(hi), c[k]);
            const double shift = q.first / q.mass, mean = c[k] + shift;
            residual[k] = -shift;
            if (!first) lower[k] = -0.5 * law.density(lo) * (mean - lo) / q.mass;
            if (!last) upper[k] = -0.5 * law.density(hi) * (hi - mean) / q.mass;
            diagonal[k] += lower[k] + upper[k];
            worst = std::max(worst, std::abs(shift));
            mass += q.mass, error += q.second;
        }
    }

    // Newton step: solves Jacobian * step = residual (Thomas algorithm; the matrix is diagonally dominant for log-concave densities).
    std::vector<double> step() const {
        std::vector<double> d = diagonal, r = residual;
        const int m = static_cast<int>(r.size());
        for (int k = 1; k < m; ++k) {
            const double f = lower[k] / d[k - 1];
            d[k] -= f * upper[k - 1];
            r[k] -= f * r[k - 1];
        }
        for (int k = m - 1; k >= 0; --k) r[k] = (r[k] - (k + 1 < m ? upper[k] * r[k + 1] : 0)) / d[k];
        return r;
    }
};

bool ascending_within(const std::vector<double>& c, double max) {
    return c.front() > 0 && c.back() < max && std::is_sorted(c.begin(), c.end(), std::less_equal<>());
}

// The positive half of the optimal levels, by Newton's method on the Lloyd conditions. The optimum is unique (log-concave density), and
// from the companding guess Newton converges in a handful of passes where plain Lloyd iteration needs tens of thousands at 8 bits.
std::vector<double> solve_half(const Law& law, int m) {
    std::vector<double> c = companding_guess(law, m);
    const double tolerance = 1e-13 * law.sigma();
    for (int pass = 0; pass < 100; ++pass) {
        const Lloyd now(law, c);
        if (now.worst < tolerance) return c;
        const std::vector<double> step = now.step();
        double damping = 1;
        std::vector<double> next;
        do {
            next = c;
            for (int k = 0; k < m; ++k) next[k] -= damping * step[k];
            damping /= 2;
        } while (!ascending_within(next, law.x(law.u_max())) && damping > 1e-6);
        c = std::move(next);
    }
    throw std::logic_error("codebook: no convergence for " + std::to_string(2 * m) + " levels, head_dim " + std::to_string(law.d));
}

// The int8 image: the step that makes the rounding error (weighted by the cells' masses) least, among those that keep |i8| <= 127.
void make_i8(const Law& law, const std::vector<double>& c, Codebook& book) {
    const int m = static_cast<int>(c.size());
    std::vector<double> mass(m);
    for (int k = 0; k < m; ++k) {
        const double lo = k == 0 ? 0 : (c[k - 1] + c[k]) / 2;
        mass[k] = integrate(law, law.u(lo), k == m - 1 ? law.u_max() : law.u((c[k] + c[k + 1]) / 2), 0).mass;
    }
    double best = std::numeric_limits<double>::infinity(), best_step = 0;
    for (int i = 0; i <= 4000; ++i) {
        const double step = c.back() / (127 - i * (27.0 / 4000));  // 100 to 127 steps for the outermost level
        double error = 0;
        for (int k = 0; k < m; ++k) {
            const double e = std::nearbyint(c[k] / step) * step - c[k];
            error += mass[k] * e * e;
        }
        if (error < best) best = error, best_step = step;
    }
    book.i8_step = static_cast<float>(best_step);
    for (float v : book.centroids) book.i8.push_back(static_cast<std::int8_t>(std::lrint(v / best_step)));
}

Codebook solve(const Law& law, int bits) {
    if (bits < 1 || bits > 8) throw std::invalid_argument("codebook: bits must be 1 to 8, not " + std::to_string(bits));
    const int m = 1 << (bits - 1);
    const std::vector<double> c = solve_half(law, m);
    const Lloyd at(law, c);
    Codebook book;
    book.bits = bits;
    book.head_dim = law.d;
    book.mse = (law.d ? law.d : 1) * at.error / at.mass;
    book.residual = at.worst / law.sigma();
    for (int k = m - 1; k >= 0; --k) book.centroids.push_back(static_cast<float>(-c[k]));
    for (int k = 0; k < m; ++k) book.centroids.push_back(static_cast<float>(c[k]));
    for (int k = m - 1; k > 0; --k) book.boundaries.push_back(static_cast<float>(-(c[k] + c[k - 1]) / 2));
    book.boundaries.push_back(0);
    for (int k = 1; k < m; ++k) book.boundaries.push_back(static_cast<float>((c[k] + c[k - 1]) / 2));
    if (bits <= 4) make_i8(law, c, book);
    return book;
}

}  // namespace

std::uint32_t Codebook::quantize(float t) const {
    return static_cast<std::uint32_t>(std::upper_bound(boundaries.begin(), boundaries.end(), t) - boundaries.begin());
}

Codebook solve_codebook(int bits, int head_dim) {
    if (head_dim < 8) throw std::invalid_argument("codebook: head_dim must be at least 8, not " + std::to_string(head_dim));
    return solve(Law{head_dim}, bits);
}

Codebook solve_gaussian_codebook(int bits) { return solve(Law{0}, bits); }

const Codebook& codebook_for(int bits, int head_dim) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<const Codebook>> books;
    const std::lock_guard lock(mutex);
    auto& book = books[{bits, head_dim}];
    if (!book) book = std::make_unique<const Codebook>(solve_codebook(bits, head_dim));
    return *book;
}

}  // namespace turboquant
