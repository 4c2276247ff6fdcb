#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>

#include "turboquant/kernels/kernel_table.h"

namespace turboquant {
namespace {

// The code that runs is that of the level asked for, and no two levels share an entry point (which the linker would do to equal names).
TEST(Dispatch, ForcedLevelRuns) {
    std::set<const void*> entries;
    for (const SimdLevel level : available_simd_levels()) {
        const Kernels& k = kernels(level);
        EXPECT_EQ(kernels_level(k), level);
        for (const void* f : {reinterpret_cast<const void*>(k.level), reinterpret_cast<const void*>(k.encode),
                              reinterpret_cast<const void*>(k.attend), reinterpret_cast<const void*>(k.finish)})
            EXPECT_TRUE(entries.insert(f).second) << simd_level_name(level);
    }
    EXPECT_EQ(entries.size(), 4 * available_simd_levels().size());
}

TEST(Dispatch, BestIsLastAvailable) {
    ASSERT_FALSE(available_simd_levels().empty());
    EXPECT_EQ(available_simd_levels().front(), SimdLevel::scalar);
    EXPECT_EQ(kernels_level(kernels()), available_simd_levels().back());
    EXPECT_GE(compiled_simd_levels().size(), available_simd_levels().size());
}

TEST(Dispatch, UnavailableLevelIsNamed) {
    for (const SimdLevel level : {SimdLevel::scalar, SimdLevel::neon, SimdLevel::avx2, SimdLevel::avx512}) {
        EXPECT_EQ(find_simd_level(simd_level_name(level)), level);
        if (std::ranges::find(available_simd_levels(), level) != available_simd_levels().end()) continue;
        try {
            kernels(level);
            ADD_FAILURE() << "no exception for " << simd_level_name(level);
        } catch (const std::invalid_argument& e) {
            EXPECT_NE(std::string(e.what()).find(simd_level_name(level)), std::string::npos);
            EXPECT_NE(std::string(e.what()).find("scalar"), std::string::npos) << "the available levels are not named";
        }
    }
    EXPECT_EQ(find_simd_level("sse9"), std::nullopt);
}

}  // namespace
}  // namespace turboquant
