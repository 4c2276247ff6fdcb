#include "turboquant/llama/session.h"

#include <filesystem>
#include <thread>

#include "fmt/format.h"
#include "turboquant/ggml/kv_names.h"
#include "turboquant/llama/gguf_file.h"
#include "turboquant/llama/gpu_backend.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {

namespace {

int all_threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

bool is_cpu(const std::string& place) { return place == "CPU" || place.starts_with("CPU ("); }

int n_layers(const std::string& path) {
    const GgufFile file(path);
    const auto text = [&](const std::string& key) {
        const std::int64_t at = gguf_find_key(file.gguf(), key.c_str());
        return at >= 0 && gguf_get_kv_type(file.gguf(), at) == GGUF_TYPE_STRING ? gguf_get_val_str(file.gguf(), at) : "";
    };
    const std::int64_t at = gguf_find_key(file.gguf(), (text("general.architecture") + std::string(".block_count")).c_str());
    if (at < 0 || gguf_get_kv_type(file.gguf(), at) != GGUF_TYPE_UINT32)
        throw Error(fmt::format("'{}' does not say how many layers it has; give -ngl 0 or 999", path));
    return static_cast<int>(gguf_get_val_u32(file.gguf(), at));
}

Error llama_could_not_load(const std::string& path) {
    return Error(
        fmt::format("cannot load model '{}': not a whole GGUF file, or one this llama.cpp does not know. Download or convert it again.{}",
                    path, take_log_problems()));
}

}  // namespace

ModelFile::ModelFile(std::string path, ModelOptions options) : path_(std::move(path)), options_(std::move(options)) {
    if (!std::filesystem::is_regular_file(path_)) throw Error(fmt::format("model file '{}' does not exist; check -m", path_));
    // Builds of llama.cpp with its back-ends in files of their own load none unasked.
    if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) ggml_backend_load_all();
    if (options_.n_gpu_layers != 0) gpu_ = load_gpu_backend(options_.gpu_backend);
    llama_backend_init();
}

// Layers count as in llama.cpp: its last ones are offloaded first, and the output counts as one more.
void ModelFile::use_device() {
    if (has_device()) return;
    plugin_ = std::make_unique<Plugin>(options_.backend_path);
    const int wanted = options_.n_gpu_layers, layers = wanted > 0 ? n_layers(path_) + 1 : 0;
    ggml_backend_dev_t last = plugin_->new_device(wanted == 0 ? "cpu" : "");
    if (const std::string place = plugin_->place(last); wanted > 0 && is_cpu(place))
        throw Error(
            fmt::format("-ngl {}: no layer can be on a GPU, which leaves the {}; give llama.cpp's CUDA backend with --gpu-backend, "
                        "or leave -ngl out",
                        wanted, place));
    if (wanted > 0 && wanted < layers) {
        devices_ = {plugin_->new_device("cpu")};
        split_ = {static_cast<float>(layers - wanted), static_cast<float>(wanted)};
    }
    devices_.push_back(last);
    set_caches({});
    model_.reset();
}

void ModelFile::set_caches(const CacheSpec& spec) const {
    for (ggml_backend_dev_t dev : devices_) plugin_->set_spec(dev, spec);
}

double ModelFile::cache_bytes() const {
    double bytes = 0;
    for (ggml_backend_dev_t dev : devices_) bytes += static_cast<double>(plugin_->stats(dev).format_bytes);
    return bytes;
}

std::string ModelFile::last_error() const {
    for (ggml_backend_dev_t dev : devices_)
        if (std::string text = plugin_->last_error(dev); !text.empty()) return text;
    return {};
}

std::string ModelFile::cache_config() const { return has_device() ? plugin_->config(devices_.back()) : std::string(); }

bool ModelFile::takes_residuals() const { return !has_device() || is_cpu(plugin_->place(devices_.back())); }

std::string ModelFile::place() const {
    if (!has_device()) return "CPU";
    const std::string last = plugin_->place(devices_.back());
    if (is_cpu(last)) return last;
    return split_.empty() ? last + ", all layers" : fmt::format("CPU and, the last {} layers, {}", split_[1], last);
}

std::shared_ptr<llama_model> ModelFile::model() {
    if (model_) return model_;
    if (gpu_) use_device();
    if (weights_.path().empty()) {
        try {
            quantized_ = has_quantized_weights(path_);
        } catch (const Error&) {
            throw llama_could_not_load(path_);
        }
        if (options_.f16_weights && quantized_) {
            const int n_threads = options_.n_threads > 0 ? options_.n_threads : all_threads();
            weights_ = f16_weights(path_, options_.weights_file, n_threads, options_.monitor);
            quantized_ = false;
        } else {
            if (options_.f16_weights) options_.monitor.note("weights: not quantized, used as they are");
            weights_ = own_weights(path_);
        }
    }
    std::vector<ggml_backend_dev_t> devices = devices_;
    devices.push_back(nullptr);
    std::vector<float> split(llama_max_devices());
    std::ranges::copy(split_, split.begin());
    llama_model_params params = llama_model_default_params();
    params.devices = devices.data();
    params.n_gpu_layers = 999;  // of our devices: the caches of all layers
    if (!split_.empty()) params.tensor_split = split.data();
    take_log_problems();
    model_ = {llama_model_load_from_file(weights_.path().c_str(), params), [](llama_model* m) {
                  if (m) llama_model_free(m);
              }};
    if (!model_) throw llama_could_not_load(path_);
    const llama_model* m = model_.get();
    if (llama_model_has_encoder(m) || !llama_model_has_decoder(m))
        throw Error(fmt::format("model '{}' is no decoder-only language model; this command needs one", path_));
    if (llama_model_is_recurrent(m)) throw Error(fmt::format("model '{}' is recurrent: it has no KV cache to compress", path_));
    return model_;
}

Session::Session(ModelFile& file, const CacheSpec& spec, const ContextOptions& options) : spec_(spec), options_(options), file_(&file) {
    if (spec.ours) file.use_device();
    model_ = file.model();
    file.set_caches(spec);
    others_bytes_ = file.cache_bytes();
    if (options_.n_threads == 0) options_.n_threads = all_threads();
    options_.n_batch = std::min(options_.n_batch, options_.n_ctx);
    options_.n_ubatch = std::min(options_.n_ubatch, options_.n_batch);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(options_.n_ctx);
    params.n_batch = static_cast<std::uint32_t>(options_.n_batch);
    params.n_ubatch = static_cast<std::uint32_t>(options_.n_ubatch);
    params.n_threads = params.n_threads_batch = options_.n_threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.type_k = spec.type_k;
    params.type_v = spec.type_v;
    params.swa_full = false;  // sliding-window layers hold their window only, as in llama.cpp's tools
    params.no_perf = true;
    params.cb_eval = see_node;
    params.cb_eval_user_data = this;
    take_log_problems();
    context_.reset(llama_init_from_model(model_.get(), params));
    if (!context_) {
        const std::string ours = file_->last_error();
        throw Error(fmt::format("llama.cpp could not make a context of {} tokens with a {} cache{}{}; try a smaller -c or another --kv{}",
                                options_.n_ctx, spec_.name, ours.empty() ? "" : ": ", ours, take_log_problems()));
    }
    batch_ = llama_batch_init(options_.n_batch, 0, 1);
    batch_owner_.reset(&batch_);
}

// llama.cpp's public interface does not tell a cache's shape, but its evaluation callback is shown every operation beforehand; those on the
// cache carry its tensors. Answering false means nothing is computed separately.
bool Session::see_node(ggml_tensor* t, bool ask, void* self) {
    const ggml_tensor* root = t->view_src;
    if (!ask || !root) return !ask;
    if (!ggml::parse_kv_name(root->name)) return false;
    auto& kv = static_cast<Session*>(self)->kv_;
    if (!kv.contains(root->name)) {
        const double cells = static_cast<double>(root->ne[1] * root->ne[2]);
        kv[root->name] = {static_cast<double>(ggml_nelements(root)), static_cast<double>(ggml_nbytes(root)), cells};
    }
    return false;
}

bool Session::cut(int pos) {
    llama_memory_t memory = llama_get_memory(context());
    if (!llama_memory_seq_rm(memory, 0, pos, -1)) return false;
    // A sliding window must still hold all that the token at pos will look at.
    const int window = llama_model_n_swa(model());
    return window == 0 || llama_memory_seq_pos_min(memory, 0) <= std::max(0, pos - window);
}

const float* Session::decode(std::span<const llama_token> tokens, int pos, int first_output, int end_output) {
    batch_.n_tokens = static_cast<std::int32_t>(tokens.size());
    bool any = false;
    for (std::size_t i = 0; i < tokens.size(); i++) {
        const int p = pos + static_cast<int>(i);
        batch_.token[i] = tokens[i];
        batch_.pos[i] = p;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = 0;
        batch_.logits[i] = p >= first_output && p < end_output;
        any = any || batch_.logits[i];
    }
    take_log_problems();
    if (const int rc = llama_decode(context(), batch_); rc != 0) {
        const std::string ours = file_->last_error();
        throw Error(fmt::format("llama.cpp failed to decode at position {} with a {} cache (code {}){}{}{}", pos, spec_.name, rc,
                                ours.empty() ? (rc == 1 ? "; the context is full: use a larger -c" : "; run again with --verbose") : ": ",
                                ours, take_log_problems()));
    }
    return any ? llama_get_logits(context()) : nullptr;
}

KvMemory Session::memory() const {
    KvMemory m;
    double values = 0;
    for (const auto& [name, t] : kv_) {
        values += t.values;
        m.bytes += t.bytes;
        m.bytes_per_token += t.bytes / t.cells;
        m.f16_bytes_per_token += 2 * t.values / t.cells;
    }
    m.f16_bytes = 2 * values;
    if (values == 0) return m;
    if (spec_.ours) {
        m.bytes = file_->cache_bytes() - others_bytes_;
        m.bytes_per_token = m.f16_bytes_per_token * m.bytes / m.f16_bytes;
    }
    m.bits_per_value = 8 * m.bytes / values;
    return m;
}

std::string Session::config() const {
    const std::string cache =
        spec_.ours ? fmt::format("turboquant backend, {}", file_->cache_config())
                   : fmt::format("llama.cpp's own, keys {}, values {}", ggml_type_name(spec_.type_k), ggml_type_name(spec_.type_v));
    return fmt::format("--kv {}: {}; weights and cache on {}; context {}, batch {}/{}, threads {}, flash attention on", spec_.name, cache,
                       file_->place(), llama_n_ctx(context()), llama_n_batch(context()), llama_n_ubatch(context()), options_.n_threads);
}

}  // namespace turboquant::llama
