// What the tests of the kernels share.
#pragma once

#include <string>
#include <vector>

#include "tests/attention/problem.h"
#include "turboquant/kernels/kernels.h"

namespace turboquant::test {

/// What the kernels of a level make of a problem.
inline std::vector<float> kernel(Problem& p, SimdLevel level) {
    return p.run([&](const AttentionArgs& a) { attention(kernels(level), a); });
}

inline std::string level_name(SimdLevel level) { return std::string(simd_level_name(level)); }

}  // namespace turboquant::test
