#include "turboquant/codec/trellis.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace turboquant {
namespace {

struct Polynomials {
    std::uint32_t h0, h1;
};

// Ungerboeck 1982/1987, one-dimensional codes of 8 to 256 states.
constexpr Polynomials kUngerboeck[] = {{013, 04}, {023, 04}, {045, 010}, {0103, 024}, {kTrellisH0, kTrellisH1}, {0515, 0362}};
constexpr int kMinMemory = 3, kMaxMemory = 8;

// Trained by scripts/train_trellis.cpp.
struct Trained {
    float step;  // in units of sigma
    std::array<std::int8_t, 32> positive;
};
constexpr Trained kTrained[] = {
    {.011647f, {22, 105}},
    {.017070f, {11, 33, 62, 109}},
    {.026230f, {4, 12, 20, 29, 39, 52, 69, 95}},
    {.025148f, {2, 7, 12, 17, 22, 27, 33, 38, 44, 51, 58, 66, 76, 87, 103, 125}},
    {.033058f,
     {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 24, 26, 28, 30, 33, 35, 38, 40, 43, 46, 49, 52, 56, 60, 64, 68, 73, 79, 87, 96, 112}},
};

constexpr int kMaxMetric = 255;

// Costs of the four subsets and the nearest point of each, for one value.
void subset_costs(const TrellisCodebook& t, float y, int* cost, std::uint8_t* points) {
    float square[4];
    for (std::size_t k = 0; k < 4; ++k) {
        std::size_t best = k;
        for (std::size_t level = k + 4; level < t.centroids.size(); level += 4)
            if (std::abs(y - t.centroids[level]) < std::abs(y - t.centroids[best])) best = level;
        const float distance = y - t.centroids[best];
        square[k] = distance * distance;
        points[k] = static_cast<std::uint8_t>(best / 4);
    }
    const float least = *std::min_element(square, square + 4);
    for (int k = 0; k < 4; ++k) cost[k] = static_cast<int>(std::min<float>(kMaxMetric, std::nearbyint((square[k] - least) * t.cost_scale)));
}

// One pass of the search over `steps` values of a ring, beginning with value `first`.
class Pass {
  public:
    Pass(const TrellisCodebook& t, std::span<const int> costs, std::size_t first, std::size_t steps, std::vector<int> metric)
        : memory_(t.memory), metric_(std::move(metric)), oldest_(steps * metric_.size()) {
        const std::size_t n_states = metric_.size(), half = n_states / 2;
        std::vector<int> next(n_states);
        std::vector<std::uint8_t> subset(half);
        for (std::size_t j = 0; j < half; ++j) subset[j] = static_cast<std::uint8_t>(t.subset(static_cast<std::uint32_t>(2 * j)));
        for (std::size_t i = 0; i < steps; ++i) {
            const int* cost = costs.data() + (first + i) * 4 % costs.size();
            std::uint8_t* oldest = oldest_.data() + i * n_states;
            // States j and j + half lead to 2j and 2j + 1; h0 has both ends, h1 neither: a change of the newest or of the oldest bit moves
            // 2 subsets on.
            for (std::size_t j = 0; j < half; ++j)
                for (std::size_t bit = 0; bit < 2; ++bit) {
                    const std::size_t z = subset[j] ^ 2 * bit;
                    const int a = std::min(metric_[j] + cost[z], kMaxMetric), b = std::min(metric_[j + half] + cost[z ^ 2], kMaxMetric);
                    oldest[2 * j + bit] = b < a;
                    next[2 * j + bit] = std::min(a, b);
                }
            std::swap(metric_, next);
            if (i % kTrellisNormalizeEvery == kTrellisNormalizeEvery - 1) {
                const int base = *std::min_element(metric_.begin(), metric_.end());
                for (int& m : metric_) m -= base;
            }
        }
    }

    std::size_t best_state() const { return std::min_element(metric_.begin(), metric_.end()) - metric_.begin(); }

    /// State before step i, on the way to `state` after it.
    std::size_t back(std::size_t i, std::size_t state) const {
        return (state | static_cast<std::size_t>(oldest_[i * metric_.size() + state]) << memory_) >> 1;
    }

  private:
    int memory_;
    std::vector<int> metric_;
    std::vector<std::uint8_t> oldest_;  // [step][state]: oldest bit of the window of the way taken
};

// Calls f(i, window of value i) around the ring.
template <class F>
void for_each_window(const TrellisCodebook& t, std::span<const std::uint8_t> codes, F f) {
    const std::size_t n = codes.size();
    const auto bit = [&](std::size_t i) { return codes[i] >> (t.bits - 1) & 1u; };
    std::uint32_t window = 0;
    for (std::size_t i = n - t.memory; i < n; ++i) window = window << 1 | bit(i);
    for (std::size_t i = 0; i < n; ++i) {
        window = (window << 1 | bit(i)) & ((2u << t.memory) - 1);
        f(i, window);
    }
}

void check(const TrellisCodebook& t, std::size_t a, std::size_t b) {
    if (a != static_cast<std::size_t>(t.head_dim) || b != a)
        throw std::invalid_argument("trellis: got " + std::to_string(a) + " and " + std::to_string(b) + " entries for head_dim " +
                                    std::to_string(t.head_dim));
}

}  // namespace

TrellisCodebook make_trellis(int bits, int head_dim, int memory, std::vector<std::int8_t> i8, float step) {
    if (bits < kTrellisMinBits || bits > kTrellisMaxBits || memory < kMinMemory || memory > kMaxMemory ||
        i8.size() != std::size_t{2} << bits)
        throw std::invalid_argument("trellis: no code of " + std::to_string(bits) + " bits, 2^" + std::to_string(memory) + " states and " +
                                    std::to_string(i8.size()) + " levels; there are 1..5 bits, 2^3..2^8 states");
    TrellisCodebook t;
    t.bits = bits, t.head_dim = head_dim, t.memory = memory;
    t.h0 = kUngerboeck[memory - kMinMemory].h0, t.h1 = kUngerboeck[memory - kMinMemory].h1;
    t.i8 = std::move(i8);
    t.i8_step = static_cast<float>(step / std::sqrt(static_cast<double>(head_dim)));
    for (std::int8_t level : t.i8) t.centroids.push_back(static_cast<float>(level) * t.i8_step);
    const std::size_t half = t.i8.size() / 2;
    const float gap = t.centroids[half] - t.centroids[half - 1];
    t.cost_scale = 8 / (gap * gap);
    return t;
}

const TrellisCodebook& trellis_for(int bits, int head_dim) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, TrellisCodebook> shared;
    if (bits < kTrellisMinBits || bits > kTrellisMaxBits)
        throw std::invalid_argument("trellis: " + std::to_string(bits) + " bits; there are 1 to 5");
    const std::lock_guard lock(mutex);
    const auto [it, created] = shared.try_emplace({bits, head_dim});
    if (created) {
        const Trained& trained = kTrained[bits - kTrellisMinBits];
        const std::size_t half = std::size_t{1} << bits;
        std::vector<std::int8_t> i8;
        for (std::size_t k = half; k-- > 0;) i8.push_back(static_cast<std::int8_t>(-trained.positive[k]));
        i8.insert(i8.end(), trained.positive.begin(), trained.positive.begin() + half);
        it->second = make_trellis(bits, head_dim, kTrellisMemory, std::move(i8), trained.step);
    }
    return it->second;
}

void trellis_encode(const TrellisCodebook& t, std::span<const float> y, std::span<std::uint8_t> codes) {
    check(t, y.size(), codes.size());
    const std::size_t n = y.size(), n_states = std::size_t{1} << t.memory;
    std::vector<int> costs(4 * n);
    std::vector<std::uint8_t> points(4 * n);
    for (std::size_t i = 0; i < n; ++i) subset_costs(t, y[i], &costs[4 * i], &points[4 * i]);

    const Pass joint(t, costs, (n - kTrellisOverlap % n) % n, 2 * kTrellisOverlap, std::vector<int>(n_states, 0));
    std::size_t state = joint.best_state();
    for (std::size_t i = 2 * kTrellisOverlap; i-- > kTrellisOverlap;) state = joint.back(i, state);

    std::vector<int> metric(n_states, kMaxMetric);
    metric[state] = 0;
    const Pass ring(t, costs, 0, n, std::move(metric));
    for (std::size_t i = n; i-- > 0; state = ring.back(i, state)) codes[i] = static_cast<std::uint8_t>((state & 1) << (t.bits - 1));
    for_each_window(t, codes, [&](std::size_t i, std::uint32_t window) { codes[i] |= points[4 * i + t.subset(window)]; });
}

void trellis_levels(const TrellisCodebook& t, std::span<const std::uint8_t> codes, std::span<std::uint8_t> levels) {
    check(t, codes.size(), levels.size());
    for_each_window(t, codes, [&](std::size_t i, std::uint32_t window) {
        levels[i] = static_cast<std::uint8_t>(4 * (codes[i] & ((1u << (t.bits - 1)) - 1)) + t.subset(window));
    });
}

}  // namespace turboquant
