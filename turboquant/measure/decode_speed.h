// How fast one token after another is decoded, against the number of tokens before it in the cache.
#pragma once

#include <span>
#include <vector>

#include "turboquant/llama/session.h"

namespace turboquant::measure {

struct DecodeSpeed {
    std::string kv;
    int depth = 0;  ///< tokens in the cache before the first one that is timed
    double ms = 0;  ///< median over kTimedTokens single tokens
    double tokens_per_s() const { return 1000 / ms; }
};

constexpr int kTimedTokens = 32;

/// Four depths: nothing, a quarter, half, and as much of a context of n_ctx as leaves room for the timed tokens. Ascending, without
/// repetitions.
std::vector<int> default_depths(int n_ctx);

/// Times every format at every depth (ascending, not negative). The caches are filled from `tokens`, repeated as needed, and take turns a
/// few tokens each, so that a busy machine slows all of them alike. The context is as large as the largest depth needs; n_ctx of the
/// options is ignored. Throws Error.
std::vector<DecodeSpeed> decode_speed(llama::ModelFile& file, const std::vector<llama::CacheSpec>& specs,
                                      std::span<const llama_token> tokens, const std::vector<int>& depths, llama::ContextOptions options);

}  // namespace turboquant::measure
