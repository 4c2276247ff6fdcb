// What the conformance tests share: loading the library into an unmodified ggml, models, contexts, decoding, comparing logits.
// Nothing here, or in any test beside it, links our own library: all goes through llama.h, ggml's headers and ggml_backend_load.
//
// A device is named by its SPEC word; "f16" stands for llama.cpp's own cache (no device), which must pass the behaviour tests too: it shows
// that a test asks for what llama.cpp does.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "gtest/gtest.h"
#include "llama.h"
#include "turboquant/ggml/plugin.h"

namespace turboquant::conformance {

/// All devices, in the order of the registry.
inline const std::vector<std::string> kFormats = {"turbo4", "turbo3", "turbo2", "turbo5", "turbo6", "turbo8",
                                                  "raw",    "tcq4",   "tcq3",   "tcq2",   "tcq5",   "tcq1"};
/// turbo8 with the key channels of the demo model scaled, as a plan would: not a device of the registry.
inline const std::string kScaled = "scaled";
/// Another format for each of the demo model's two KV heads, as a plan would.
inline const std::string kMixed = "mixed";
/// The format alone, without exact windows.
inline std::string compressed(const std::string& name) { return name == "f16" ? name : name + ",sink=0,recent=0"; }
/// kFormats, llama.cpp's own cache, scaled keys and formats per head.
inline std::vector<std::string> with_f16() {
    std::vector<std::string> names = kFormats;
    names.insert(names.begin(), "f16");
    names.push_back(kScaled);
    names.push_back(kMixed);
    return names;
}

/// What main() was told.
struct Options {
    std::string gpu_backend, plugin;
};
Options& options();

/// The library's registry, loaded on first use. Throws std::runtime_error.
ggml_backend_reg_t plugin();
/// Whether devices are a GPU's (or, with ggml-turboquant-as-gpu, what stands in for it).
bool on_gpu();
/// Device of that SPEC; null for "f16".
ggml_backend_dev_t device(const std::string& name);
/// One of the extra procedures of plugin.h.
template <class F>
F procedure(const char* name) {
    return reinterpret_cast<F>(ggml_backend_reg_get_proc_address(plugin(), name));
}
turboquant_kv_stats kv_stats(const std::string& name);
std::string last_error(const std::string& name);

/// All that llama.cpp and ggml logged since the last call.
std::string take_log();
/// The same with the level of each message; a call of either forgets what the other would have given.
struct LogLine {
    ggml_log_level level;
    std::string text;
};
std::vector<LogLine> take_log_lines();

struct Free {
    void operator()(llama_model* m) const { llama_model_free(m); }
    void operator()(llama_context* c) const { llama_free(c); }
    void operator()(ggml_backend_t b) const { ggml_backend_free(b); }
    void operator()(ggml_backend_sched_t s) const { ggml_backend_sched_free(s); }
    void operator()(ggml_backend_buffer_t b) const { ggml_backend_buffer_free(b); }
    void operator()(ggml_context* c) const { ggml_free(c); }
};
template <class T>
using Owned = std::unique_ptr<T, Free>;
using ModelPtr = Owned<llama_model>;
using ContextPtr = Owned<llama_context>;

/// Null-terminated list of one device for llama_model_params ("f16": the CPU alone).
std::vector<ggml_backend_dev_t> device_list(const std::string& name);
/// Throws std::runtime_error.
ModelPtr load_model(const std::string& path, const std::string& device_name);
/// models/demo.gguf on a device, loaded once a process.
llama_model* demo(const std::string& device_name);
/// ../shared/models/NAME, or "" if it is not there (the caller skips).
std::string shared_model(const std::string& name);

struct ContextOptions {
    uint32_t n_ctx = 1024, n_ubatch = 512, n_seq_max = 1;
    int n_threads = 2;
    bool kv_unified = false, swa_full = false;
    llama_flash_attn_type flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;
};
/// Throws std::runtime_error.
ContextPtr make_context(llama_model* model, const ContextOptions& options = {});

/// About n tokens of English written for these tests, the same each time; `variant` begins elsewhere in it.
std::vector<llama_token> text_tokens(const llama_model* model, int n, int variant = 0);
std::vector<llama_token> random_tokens(int n_vocab, int n, uint32_t seed);

struct Logits {
    int n_vocab = 0;
    std::vector<float> values;  ///< one row of n_vocab per token asked for
    int rows() const { return n_vocab ? static_cast<int>(values.size() / n_vocab) : 0; }
    std::span<const float> row(int i) const { return std::span(values).subspan(static_cast<size_t>(i) * n_vocab, n_vocab); }
    Logits from(int first) const { return {n_vocab, {values.begin() + static_cast<long>(first) * n_vocab, values.end()}}; }
    void append(const Logits& other);
};

struct BatchToken {
    llama_token id;
    llama_pos pos;
    llama_seq_id seq = 0;
};
/// Decodes in batches of at most `step` tokens and returns the logits of every token. Throws std::runtime_error if llama_decode fails.
Logits decode(llama_context* ctx, std::span<const BatchToken> tokens, int step = 2048);
Logits decode(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos = 0, llama_seq_id seq = 0, int step = 2048);
/// Decodes without looking at logits but the last token's, which are returned: for filling a cache.
Logits feed(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos = 0, llama_seq_id seq = 0, int step = 512);
/// llama_decode's own result, for what must fail.
int try_decode(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos = 0, llama_seq_id seq = 0);

llama_token best_token(std::span<const float> logits);
/// Feeds `token` at `pos`, then what the model says, n times; the tokens said.
std::vector<llama_token> greedy(llama_context* ctx, llama_token token, llama_pos pos, int n, llama_seq_id seq = 0);

/// Mean KL divergence of the softmaxes, nats per token: KL(reference || other).
double mean_kld(const Logits& reference, const Logits& other);
/// Largest difference of logits.
double max_difference(const Logits& a, const Logits& b);

/// A directory for files of this test process, removed at its end.
std::string temp_path(const std::string& file);

}  // namespace turboquant::conformance
