// Contenders of `turboquant bench`: caches of the same data in one format each, ours or ggml's, that can be filled and attended over.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "turboquant/llama/cache_spec.h"

namespace turboquant::cli {

using llama::CacheSpec;

struct BenchShape {
    int n_head = 32, n_head_kv = 8, head_dim = 128;
    int n_kv = 4096;   ///< cells, all of them filled
    int n_tokens = 1;  ///< query tokens; they are the last cells' tokens and see no later ones
    int n_threads = 1;

    std::size_t n_embd_kv() const { return static_cast<std::size_t>(n_head_kv) * head_dim; }
    std::size_t n_embd_q() const { return static_cast<std::size_t>(n_head) * head_dim; }
};

/// Standard normal keys, values and queries, the same on every machine, and the causal mask.
struct BenchData {
    explicit BenchData(const BenchShape& shape);

    std::vector<float> k, v;          ///< [n_kv][n_head_kv][head_dim]
    std::vector<float> q;             ///< [n_tokens][n_head][head_dim]
    std::vector<std::uint16_t> mask;  ///< fp16 [n_tokens][n_kv]
};

class BenchCache {
  public:
    virtual ~BenchCache() = default;
    /// Writes all keys and values into the cache.
    virtual void encode() = 0;
    /// Attention of all query tokens over all cells.
    virtual void attend() = 0;
    /// Result of attend: [n_tokens][n_head][head_dim].
    virtual std::span<const float> output() const = 0;
    /// After attend(): why what this cache holds or computes cannot be right, or "". llama.cpp's own caches are taken at their word.
    virtual std::string fault() { return {}; }
    /// Bytes of keys and values in this format.
    virtual double bytes() const = 0;
};

/// |x - reference| / |reference|, of x.size() values.
double relative_error(std::span<const float> reference, std::span<const float> x);

/// `data` must outlive the result. Throws CommandError on shapes that a format cannot have.
std::unique_ptr<BenchCache> make_bench_cache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data);

/// One implementation each.
std::unique_ptr<BenchCache> make_ggml_cache(const CacheSpec& spec, const BenchShape& shape, const BenchData& data);
std::unique_ptr<BenchCache> make_turboquant_cache(const KvSpec& spec, const BenchShape& shape, const BenchData& data);

}  // namespace turboquant::cli
