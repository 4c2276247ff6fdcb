// `turboquant bench ... --backend cuda`: the CUDA kernels timed by themselves; scripts/bench-gpu puts PyTorch beside them.
#pragma once

#include <string>
#include <vector>

#include "turboquant/cli/bench_cache.h"

namespace turboquant::cli {

struct CudaBenchOptions {
    std::vector<std::string> kv;  ///< formats: turbo4, or k=turbo4,v=turbo3
    std::vector<int> tokens;      ///< cells of each sequence; encoding: tokens of a call
    BenchShape shape;
    int batch = 1;         ///< sequences
    int query_tokens = 1;  ///< of each sequence
    int exact_rows = 0;    ///< of each sequence, kept exactly beside
    bool term = false;     ///< with the key offset: attention adds its score term, encoding takes it out of the keys
    bool json = false;
};

/// Table or JSON of the times; medians of CUDA-graph replays over inputs larger than L2. Throws CommandError where the build has no CUDA,
/// the machine no GPU, a format or shape no kernel.
std::string bench_cuda(const CudaBenchOptions& options, bool attention);

}  // namespace turboquant::cli
