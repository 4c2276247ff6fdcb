// Does a model with a compressed cache still find what stands once in a long text?
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "turboquant/llama/session.h"
#include "turboquant/spec/windows.h"

namespace turboquant::measure {

struct NeedleOptions {
    std::string text_file{}, template_file{}, calib_file{};
    std::vector<std::string> kv{};
    std::vector<int> ctx{2048, 4096, 8192};
    WindowSizes windows{};
    llama::ContextOptions context{};
    int depths = 10, needles = 3;
    std::uint64_t seed = 1;
};

/// One format at one context.
struct NeedleResult {
    std::string kv;
    int ctx = 0;
    std::vector<int> found;  ///< per depth
    int per_depth = 0;       ///< questions

    int sum() const { return std::accumulate(found.begin(), found.end(), 0); }
    int total() const { return per_depth * static_cast<int>(found.size()); }
};

/// Depth i of n in percent of the text, two digits after the point.
double depth_percent(std::size_t i, std::size_t n);

/// Every format at every context, format by format, all contexts of each. Throws Error.
std::vector<NeedleResult> search_needles(llama::ModelFile& file, NeedleOptions options);

}  // namespace turboquant::measure
