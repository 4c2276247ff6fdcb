#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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
}

#if defined(__x86_64__)
constexpr SimdLevel kOfArchitecture[] = {SimdLevel::scalar, SimdLevel::avx2, SimdLevel::avx512};
#elif defined(__aarch64__)
constexpr SimdLevel kOfArchitecture[] = {SimdLevel::scalar, SimdLevel::neon};
#else
constexpr SimdLevel kOfArchitecture[] = {SimdLevel::scalar};
#endif

TEST(Dispatch, EveryLevelOfTheArchitectureIsCompiled) { EXPECT_TRUE(std::ranges::equal(compiled_simd_levels(), kOfArchitecture)); }

// What the processor can, as the system tells it.
TEST(Dispatch, AvailableIsWhatTheProcessorCan) {
    std::ifstream file("/proc/cpuinfo");
    std::set<std::string> flags;
    for (std::string line; std::getline(file, line) && flags.empty();)
        if (line.starts_with("flags") || line.starts_with("Features")) {
            std::istringstream words(line.substr(line.find(':') + 1));
            flags = {std::istream_iterator<std::string>(words), {}};
        }
    if (flags.empty()) GTEST_SKIP() << "no list of features in /proc/cpuinfo";
    const auto can = [&](std::initializer_list<const char*> names) {
        return std::ranges::all_of(names, [&](const char* name) { return flags.contains(name); });
    };
    std::vector<SimdLevel> expected = {SimdLevel::scalar};
    if (can({"asimddp"})) expected.push_back(SimdLevel::neon);
    const bool avx2 = can({"avx2", "fma", "f16c"});
    if (avx2) expected.push_back(SimdLevel::avx2);
    if (avx2 && can({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni"})) expected.push_back(SimdLevel::avx512);
    EXPECT_TRUE(std::ranges::equal(available_simd_levels(), expected));
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
