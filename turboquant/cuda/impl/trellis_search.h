// The Viterbi search of codec/trellis.h. Two vectors share the halves of a word, kLanes lanes share the states of a pair, 128/kLanes words
// a lane; a warp has 32/kLanes pairs.
//
// In place: where the states j and j + 64 lay, the states 2j and 2j + 1 that they lead to are put. So after r steps (modulo 7) state s lies
// at place p = s turned right by r bits, and which places meet in a step depends on r alone: the bit 6 - r of the place is the oldest bit
// of the state; the lower bits of a place are the word, the upper ones the lane.
//
// A word holds metric << 4 | history: step i (of a block of 4) adds 1 << i to ways whose oldest bit is 1. A newer step's bit counts more
// and the metric most, so the minimum keeps the specification's choice (of equal ways the one whose oldest bit is 0) and with it the way's
// own history, which moves along. After every block the 4 bits of all states are stored: they tell the state 4 steps before.
//
// Metrics are those of the specification: its saturation at 255 commutes with minima and sums, so it suffices to saturate every 8th step,
// before the least is subtracted. (Choices between saturated ways may differ; a way that ends well has none.)
#pragma once

#include "turboquant/codec/trellis.h"
#include "turboquant/cuda/impl/simt.h"

namespace turboquant::cuda {

static_assert(kTrellisMemory == 7 && kTrellisNormalizeEvery == 8);

/// What bit k of a state (of its lower six) adds to the subset of the ways out of it.
constexpr int state_bit_subset(int k) {
    return k > 5 ? 0 : 2 * static_cast<int>(kTrellisH0 >> (k + 1) & 1) + static_cast<int>(kTrellisH1 >> (k + 1) & 1);
}
constexpr int place_of(int state, int r) { return (state >> r | state << (7 - r)) & 127; }
constexpr int state_at(int place, int r) { return (place << r | place >> (7 - r)) & 127; }

template <int kLanes>
struct TrellisSearch {
    static constexpr int kWords = 128 / kLanes, kWordBits = kLanes == 8 ? 4 : kLanes == 4 ? 5 : kLanes == 16 ? 3 : 2;
    static constexpr int kPairs = 32 / kLanes;  // of a warp
    static constexpr std::uint32_t kSaturated = 0x0ff00ff0u;
    static_assert(1 << kWordBits == kWords);

    std::uint32_t metric[kWords];

    /// Subset of the ways out of a place's word bits (without the oldest bit) after r steps.
    static constexpr int word_subset(int word, int r) {
        int z = 0;
        for (int b = 0; b < kWordBits; ++b)
            if (word >> b & 1) z ^= state_bit_subset((b + r) % 7);
        return z;
    }
    static TQ_DEVICE int lane_subset(int lane, int r) {
        int z = 0;
        for (int b = kWordBits; b < 7; ++b)
            if (lane >> (b - kWordBits) & 1) z ^= state_bit_subset((b + r) % 7);
        return z;
    }

    template <int r>
    TQ_DEVICE void step(int lane, const std::uint32_t (&cost)[4], std::uint32_t bit) {
        constexpr int oldest = 6 - r;
        if constexpr (oldest < kWordBits) {
            std::uint32_t marked[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) marked[k] = cost[k] + bit;
#pragma unroll
            for (int w = 0; w < kWords; ++w)
                if (!(w >> oldest & 1)) {
                    const int z = word_subset(w, r), v = w | 1 << oldest;
                    const std::uint32_t low = metric[w], high = metric[v];
                    metric[w] = add_min_pairs(high, marked[z ^ 2], low + cost[z]);
                    metric[v] = add_min_pairs(high, marked[z], low + cost[z ^ 2]);
                }
        } else {
            const bool is_high = lane >> (oldest - kWordBits) & 1;
            const std::uint32_t own_bit = is_high ? bit : 0, other_bit = bit - own_bit;
            std::uint32_t own[4], other[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) own[k] = cost[k] + own_bit, other[k] = cost[k] + other_bit;
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const int z = word_subset(w, r);
                const std::uint32_t from = shfl_xor(metric[w], 1 << (oldest - kWordBits));
                metric[w] = add_min_pairs(from, other[z ^ 2], metric[w] + own[z]);
            }
        }
    }

    // The histories of 4 words at a time: byte 2*(w/2 % 2) + half of word w/4, nibble w%2. 16 words: as one store.
    TQ_DEVICE void store_histories(std::uint32_t* to) const {
        static_assert(kWords == 16);
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::uint32_t a = (metric[4 * i] & 0x000f000fu) | (metric[4 * i + 1] << 4 & 0x00f000f0u);
            const std::uint32_t b = (metric[4 * i + 2] & 0x000f000fu) | (metric[4 * i + 3] << 4 & 0x00f000f0u);
            words[i] = byte_perm(a, b, 0x6420);
        }
        sync_warp();  // its place may be that of costs that others of the warp have yet to read
        store_words(to, words);
    }

    TQ_DEVICE void normalize() {
        std::uint32_t least = metric[0];
#pragma unroll
        for (int w = 1; w < kWords; ++w) least = min_pairs(least, metric[w]);
#pragma unroll
        for (int d = 1; d < kLanes; d *= 2) least = min_pairs(least, shfl_xor(least, d));
        const std::uint32_t most = kSaturated - min_pairs(least, kSaturated);
#pragma unroll
        for (int w = 0; w < kWords; ++w) metric[w] = min_pairs(metric[w] - least, most);
    }

    /// After step i - 1, i a multiple of 4.
    template <bool history>
    TQ_DEVICE void end_block(int i, std::uint32_t* histories) {
        if constexpr (history) {
            store_histories(histories);
#pragma unroll
            for (int w = 0; w < kWords; ++w) metric[w] &= 0xfff0fff0u;
        }
        if (i % 8 == 0)
            normalize();
        else if (!kWideMetrics)
#pragma unroll
            for (int w = 0; w < kWords; ++w) metric[w] = min_pairs(metric[w], kSaturated);
    }

    /// Steps begin..end-1 (multiples of 8 but for the first pass's second half, where metric is as run() left it) over the values from
    /// `first` on of a ring of `dim`; costs: the four of a value of the pair, values cost_pitch words apart, halves as the metrics';
    /// histories: of this lane, block_stride words between blocks; null and `history` false: none are kept.
    template <bool history>
    TQ_DEVICE void run(int lane, const std::uint32_t* costs, int cost_pitch, int dim, int first, int begin, int end,
                       std::uint32_t* histories, int block_stride) {
        // What the lane adds to the subsets after r steps: bits 2r..
        std::uint32_t swaps = 0;
#pragma unroll
        for (int r = 0; r < 7; ++r) swaps |= static_cast<std::uint32_t>(lane_subset(lane, r)) << 2 * r;
        const std::uint32_t *from = costs + first * cost_pitch, *const ring_end = costs + dim * cost_pitch;
        std::uint32_t bit = history ? 0x00010001u : 0;
        int i = begin;
        const auto advance = [&](auto r) {
            std::uint32_t cost[4];
            const int swap = static_cast<int>(swaps >> 2 * r.value & 3);
#pragma unroll
            for (int k = 0; k < 4; ++k) cost[k] = from[k ^ swap];
            this->template step<r.value>(lane, cost, bit);
            from += cost_pitch;
            if (from == ring_end) from = costs;
            ++i;
            if constexpr (history) bit += bit;
            if (i % 4) return false;
            end_block<history>(i, histories);
            if constexpr (history) histories += block_stride, bit = 0x00010001u;
            return i == end;
        };
        // Enters where the places are after `begin` steps.
        switch (begin % 7) {
            for (;;) {
                case 0:
                    if (advance(Step<0>{})) return;
                    [[fallthrough]];
                case 1:
                    if (advance(Step<1>{})) return;
                    [[fallthrough]];
                case 2:
                    if (advance(Step<2>{})) return;
                    [[fallthrough]];
                case 3:
                    if (advance(Step<3>{})) return;
                    [[fallthrough]];
                case 4:
                    if (advance(Step<4>{})) return;
                    [[fallthrough]];
                case 5:
                    if (advance(Step<5>{})) return;
                    [[fallthrough]];
                case 6:
                    if (advance(Step<6>{})) return;
            }
        }
    }

    TQ_DEVICE void start_anywhere() {
#pragma unroll
        for (int w = 0; w < kWords; ++w) metric[w] = 0;
    }
    TQ_DEVICE void start_at(int lane, int state_a, int state_b) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const int place = lane * kWords + w;
            metric[w] = (place == state_a ? 0 : 0xff0u) | (place == state_b ? 0 : 0xff00000u);
        }
    }

    /// The best states of the two vectors after `steps` steps, of equal ones the lowest; the same in all lanes of the pair.
    TQ_DEVICE void best(int lane, int steps, int& state_a, int& state_b) const {
        const int r = steps % 7;
        std::uint32_t a = ~0u, b = ~0u;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            const std::uint32_t s = state_at(lane * kWords + w, r);
            const std::uint32_t in_a = (metric[w] & 0xffffu) << 7 | s, in_b = metric[w] >> 16 << 7 | s;
            a = in_a < a ? in_a : a, b = in_b < b ? in_b : b;
        }
#pragma unroll
        for (int d = 1; d < kLanes; d *= 2) {
            const std::uint32_t other_a = shfl_xor(a, d), other_b = shfl_xor(b, d);
            a = other_a < a ? other_a : a, b = other_b < b ? other_b : b;
        }
        state_a = static_cast<int>(a & 127), state_b = static_cast<int>(b & 127);
    }

    /// The state 4 steps before `state`, which is after `steps` of them: histories of that block, of the pair's lane 0, lanes lane_stride
    /// words apart.
    static TQ_DEVICE int back(const std::uint32_t* histories, int lane_stride, int half, int steps, int state) {
        const int p = place_of(state, steps % 7), w = p % kWords;
        const std::uint32_t word = histories[p / kWords * lane_stride + w / 4];
        const std::uint32_t h = word >> (8 * (2 * (w >> 1 & 1) + half) + 4 * (w & 1)) & 15;
        return state >> 4 | static_cast<int>(reverse_bits(h) >> 25);
    }

  private:
    template <int r>
    struct Step {
        static constexpr int value = r;
    };
};

}  // namespace turboquant::cuda
