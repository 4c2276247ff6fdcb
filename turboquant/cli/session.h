// A model with one cache, over llama.cpp's C API: loading, decoding, and what the cache takes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "llama.h"
#include "turboquant/cli/cache_spec.h"
#include "turboquant/cli/command.h"
#include "turboquant/cli/plugin_loader.h"

namespace turboquant::cli {

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

/// Opens sessions of one model file. Caches of llama.cpp's own types share one loaded model; each of our devices needs the model once more
/// (a device is a property of a loaded model), with the weights mapped from the same file.
class ModelFile {
  public:
    /// Throws CommandError if the file is missing.
    ModelFile(std::string path, const GlobalOptions& global);

    struct Loaded {
        std::shared_ptr<llama_model> model;
        ggml_backend_dev_t device = nullptr;  ///< ours, or null
    };
    /// Throws CommandError with llama.cpp's complaint if the model does not load, or has no KV cache to look at.
    Loaded load(const CacheSpec& spec);
    const Plugin* plugin() const { return plugin_.get(); }

  private:
    std::string path_, backend_path_;
    std::unique_ptr<Plugin> plugin_;
    std::shared_ptr<llama_model> llama_only_;
};

/// One context over one cache, one sequence.
class Session {
  public:
    /// Throws CommandError if the context cannot be made. `loaded` is file.load(spec); `file` must outlive the session.
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
    /// end_output); returns them, n_vocab floats each, valid until the next call (null if there are none). Throws CommandError.
    const float* decode(std::span<const llama_token> tokens, int pos, int first_output, int end_output);

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

}  // namespace turboquant::cli
