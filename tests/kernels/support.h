// What the tests of the kernels share.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tests/attention/problem.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant::test {

/// What the kernels of a level make of a problem.
inline std::vector<float> kernel(Problem& p, SimdLevel level) {
    return p.run([&](const AttentionArgs& a) { attention(kernels(level), a); });
}

struct AlignedBytes {
    explicit AlignedBytes(std::size_t n) : memory(n + 128, 0xff) {}  // floats of this pattern are NaN: nothing may rely on zeros
    std::uint8_t* data() { return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64); }
    std::vector<std::uint8_t> memory;
};

/// The same, cut for that many threads, their parts one after the other.
inline std::vector<float> kernel_in_parts(Problem& p, SimdLevel level, int n_threads) {
    return p.run([&](const AttentionArgs& a) {
        const AttentionPlan plan = plan_attention(a, n_threads);
        AlignedBytes workspace(plan.workspace_bytes);
        for (const auto part : {run_attention, merge_attention})
            for (int i = 0; i < plan.n_threads; ++i) part(kernels(level), plan, a, workspace.data(), i);
    });
}

/// Slot of each row of the keys, then of the values: all n_slots of a side in some order.
inline std::vector<std::int32_t> scattered_slots(SplitMix64& random, std::size_t n_slots) {
    std::vector<std::int32_t> slots(2 * n_slots);
    for (std::size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<std::int32_t>(i % n_slots);
    for (std::size_t i = 0; i < slots.size(); ++i) std::swap(slots[i], slots[i / n_slots * n_slots + random.bits() % n_slots]);
    return slots;
}

inline std::string level_name(SimdLevel level) { return std::string(simd_level_name(level)); }

}  // namespace turboquant::test
