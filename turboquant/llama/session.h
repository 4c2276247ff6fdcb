// A model with one cache, over llama.cpp's C API: loading, decoding, and what the cache takes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "llama.h"
#include "turboquant/llama/cache_spec.h"
#include "turboquant/llama/error.h"
#include "turboquant/llama/f16_weights.h"
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

inline constexpr int kAllThatCan = -1;

struct ModelOptions {
    std::string backend_path{};      ///< libggml-turboquant.so; empty: beside the program
    std::string gpu_backend{};       ///< llama.cpp's CUDA backend; empty: where it usually is (gpu_backend.h)
    int n_gpu_layers = kAllThatCan;  ///< the last so many on the GPU, weights and cache; kAllThatCan: all, where there is a GPU
    Monitor monitor{};               ///< of all work on this model
    bool f16_weights = false;        ///< use the weights dequantized (f16_weights.h)
    std::string weights_file{};      ///< where those are kept; empty: nowhere
    int n_threads = 0;               ///< that dequantize; 0: as many as the machine runs at once
};

/// A model file, loaded once for all caches: our devices belong to the loaded model, but their SPEC changes from context to context, and caches of
/// llama.cpp's own types lie there too. Two devices, one on the CPU and one on the GPU, where only some layers are on the GPU.
class ModelFile {
  public:
    /// Throws Error if the file is missing, or cannot be dequantized.
    ModelFile(std::string path, ModelOptions options);

    /// The loaded model. Throws Error with llama.cpp's complaint if it does not load, or has no KV cache to look at.
    std::shared_ptr<llama_model> model();
    /// To be called before model() where caches of ours are to come: otherwise the model is loaded a second time for them. Throws Error if there
    /// is no backend library.
    void use_device();
    bool has_device() const { return !devices_.empty(); }
    /// Of caches made from now on; nothing without a device. Throws Error.
    void set_caches(const CacheSpec& spec) const;
    /// Bytes that the formats of all caches alive take.
    double cache_bytes() const;
    /// What our devices refused last, "" if nothing.
    std::string last_error() const;
    /// Formats and windows of the cache that is alive, in words; "" without a device.
    std::string cache_config() const;
    /// Whether exact windows can be residuals (spec/windows.h) where the caches are: not on a GPU.
    bool takes_residuals() const;
    /// Where weights and caches are, in words: "CPU", "CUDA0 (NVIDIA H100 80GB HBM3), all layers".
    std::string place() const;

    const std::string& path() const { return path_; }
    const ModelOptions& options() const { return options_; }
    const Monitor& monitor() const { return options_.monitor; }
    /// Of what is loaded: llama.cpp rounds activations to 8 bits before it multiplies with such.
    bool quantized() const { return quantized_; }

  private:
    std::string path_;
    ModelOptions options_;
    WeightsFile weights_;
    bool quantized_ = false;
    bool gpu_ = false;  ///< llama.cpp has a CUDA backend
    std::unique_ptr<Plugin> plugin_;
    std::vector<ggml_backend_dev_t> devices_;  ///< of the first layers first
    std::vector<float> split_;                 ///< layers of each, where there are two
    std::shared_ptr<llama_model> model_;
};

/// One context over one cache, one sequence.
class Session {
  public:
    /// Throws Error if the context cannot be made. `file` must outlive the session. Sessions of ours on one file must be made one after the other:
    /// each sets the SPEC of the file's device.
    Session(ModelFile& file, const CacheSpec& spec, const ContextOptions& options);
    Session(const Session&) = delete;  // llama.cpp holds a pointer to this object
    Session& operator=(const Session&) = delete;

    llama_context* context() const { return context_.get(); }
    const llama_model* model() const { return model_.get(); }
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
    /// Known after the first decode, and of ours only while no other session of ours on the same file is alive.
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
    std::shared_ptr<llama_model> model_;
    std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, llama_free};
    llama_batch batch_{};
    std::unique_ptr<llama_batch, void (*)(llama_batch*)> batch_owner_{nullptr, [](llama_batch* b) { llama_batch_free(*b); }};
    std::map<std::string, KvTensorInfo> kv_;
    double others_bytes_ = 0;  ///< what the device held when this session was made: it may have other contexts
};

}  // namespace turboquant::llama
