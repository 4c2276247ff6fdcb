// A model with one cache, over llama.cpp's C API: loading, decoding, and what the cache takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "llama.h"
#include "turboquant/llama/cache_spec.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/monitor.h"
#include "turboquant/llama/plugin_loader.h"

namespace turboquant::llama {

/// Options of -c, -b, -ub, -t.
struct ContextOptions {
    int n_ctx = 2048;
    int n_batch = 2048;
    int n_ubatch = 512;
    int n_threads = 0;  ///< 0: as many as the machine runs at once
};

/// Bytes of the cache, everything that its format stores for all cells.
struct KvMemory {
    double bytes = 0, f16_bytes = 0;
    double bytes_per_token = 0, f16_bytes_per_token = 0;
    double bits_per_value = 0;
};

struct ModelOptions {
    std::string backend_path{};  ///< libggml-turboquant.so; empty: beside the program
    Monitor monitor{};           ///< of all work on this model
};

/// Opens sessions of one model file. Caches of llama.cpp's own types share one loaded model; each of our devices needs the model once more
/// (a device is a property of a loaded model), with the weights mapped from the same file.
class ModelFile {
  public:
    /// Throws Error if the file is missing.
    ModelFile(std::string path, ModelOptions options);

    struct Loaded {
        std::shared_ptr<llama_model> model;
        ggml_backend_dev_t device = nullptr;  ///< ours, or null
    };
    /// Throws Error with llama.cpp's complaint if the model does not load, or has no KV cache to look at.
    Loaded load(const CacheSpec& spec);
    const Plugin* plugin() const { return plugin_.get(); }
    const std::string& path() const { return path_; }
    const Monitor& monitor() const { return options_.monitor; }

  private:
    std::string path_;
    ModelOptions options_;
    std::unique_ptr<Plugin> plugin_;
    std::shared_ptr<llama_model> llama_only_;
};

/// One context over one cache, one sequence.
class Session {
  public:
    /// Throws Error if the context cannot be made. `loaded` is file.load(spec); `file` must outlive the session.
    Session(const ModelFile& file, ModelFile::Loaded loaded, const CacheSpec& spec, const ContextOptions& options);
    Session(const Session&) = delete;  // llama.cpp holds a pointer to this object
    Session& operator=(const Session&) = delete;

    llama_context* context() const { return context_.get(); }
    const llama_model* model() const { return loaded_.model.get(); }
    const llama_vocab* vocab() const { return llama_model_get_vocab(model()); }
    int n_vocab() const { return llama_vocab_n_tokens(vocab()); }
    const CacheSpec& spec() const { return spec_; }

    /// Empties the cache.
    void clear() { llama_memory_clear(llama_get_memory(context()), true); }

    /// Removes the tokens from position pos on. False if this cache cannot be cut there (recurrent states, a sliding window that has moved
    /// on): clear() it then and decode again.
    bool cut(int pos);

    /// Decodes tokens (at most n_batch) at positions pos, pos+1, ... Logits are computed for those whose position is in [first_output,
    /// end_output); returns them, n_vocab floats each, valid until the next call (null if there are none). Throws Error.
    const float* decode(std::span<const llama_token> tokens, int pos, int first_output, int end_output);

    /// Decodes tokens[from, ...), which stand at positions from, from+1, ..., at most per_call (0: n_batch) in a call, and hands out the
    /// logits of positions [first_output, end_output) as they come: sink(first position, count, logits). `work` advances by the tokens.
    /// Throws Error.
    template <class Sink>
    void feed(std::span<const llama_token> tokens, int from, int first_output, int end_output, int per_call, Work* work, Sink&& sink) {
        const int n = static_cast<int>(tokens.size()), most = per_call > 0 ? per_call : n_batch();
        for (int pos = from; pos < n; pos += most) {
            const int end = std::min(pos + most, n);
            const auto piece = tokens.subspan(static_cast<std::size_t>(pos), static_cast<std::size_t>(end - pos));
            const int first = std::max(pos, first_output);
            if (const float* logits = decode(piece, pos, first_output, end_output)) sink(first, std::min(end, end_output) - first, logits);
            if (work) work->add(end - pos);
        }
    }

    int n_batch() const { return static_cast<int>(llama_n_batch(context())); }
    /// Known after the first decode.
    KvMemory memory() const;
    /// One line naming what runs.
    std::string config() const;

  private:
    /// A KV tensor as llama.cpp declares it: for our devices that is f16 of the same shape.
    struct KvTensorInfo {
        double values = 0, bytes = 0, cells = 0;
    };
    static bool see_node(ggml_tensor* t, bool ask, void* self);

    CacheSpec spec_;
    ContextOptions options_;
    const ModelFile* file_;
    ModelFile::Loaded loaded_;
    std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
    llama_batch batch_{};
    std::unique_ptr<llama_batch, void (*)(llama_batch*)> batch_owner_{nullptr, [](llama_batch* b) { llama_batch_free(*b); }};
    std::map<std::string, KvTensorInfo> kv_;
};

}  // namespace turboquant::llama
