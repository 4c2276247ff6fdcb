#include "turboquant/llama/session.h"

#include <filesystem>
#include <thread>

#include "fmt/format.h"
#include "turboquant/ggml/kv_names.h"
#include "turboquant/llama/log.h"

namespace turboquant::llama {

ModelFile::ModelFile(std::string path, ModelOptions options) : path_(std::move(path)), options_(std::move(options)) {
    if (!std::filesystem::is_regular_file(path_)) throw Error(fmt::format("model file '{}' does not exist; check -m", path_));
    // Builds of llama.cpp with its back-ends in files of their own load none unasked.
    if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) ggml_backend_load_all();
    llama_backend_init();
}

ModelFile::Loaded ModelFile::load(const CacheSpec& spec) {
    Loaded loaded;
    if (!spec.ours && llama_only_) return {llama_only_, nullptr};
    if (spec.ours) {
        if (!plugin_) plugin_ = std::make_unique<Plugin>(options_.backend_path);
        loaded.device = plugin_->device(*spec.ours);
    }
    ggml_backend_dev_t devices[] = {loaded.device, nullptr};
    llama_model_params params = llama_model_default_params();
    params.devices = devices;
    params.n_gpu_layers = 999;  // the weights stay with the CPU all the same: our device computes nothing but the cache's operations
    take_log_problems();
    loaded.model = {llama_model_load_from_file(path_.c_str(), params), [](llama_model* m) {
                        if (m) llama_model_free(m);
                    }};
    if (!loaded.model)
        throw Error(
            fmt::format("cannot load model '{}': not a whole GGUF file, or one this llama.cpp does not know. "
                        "Download or convert it again.{}",
                        path_, take_log_problems()));
    const llama_model* m = loaded.model.get();
    if (llama_model_has_encoder(m) || !llama_model_has_decoder(m))
        throw Error(fmt::format("model '{}' is no decoder-only language model; this command needs one", path_));
    if (llama_model_is_recurrent(m)) throw Error(fmt::format("model '{}' is recurrent: it has no KV cache to compress", path_));
    if (!spec.ours) llama_only_ = loaded.model;
    return loaded;
}

Session::Session(const ModelFile& file, ModelFile::Loaded loaded, const CacheSpec& spec, const ContextOptions& options)
    : spec_(spec), options_(options), file_(&file), loaded_(std::move(loaded)) {
    if (options_.n_threads == 0) options_.n_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
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
    params.offload_kqv = true;
    params.swa_full = false;  // sliding-window layers hold their window only, as in llama.cpp's tools
    params.no_perf = true;
    params.cb_eval = see_node;
    params.cb_eval_user_data = this;
    take_log_problems();
    context_.reset(llama_init_from_model(loaded_.model.get(), params));
    if (!context_) {
        const std::string ours = loaded_.device ? file_->plugin()->last_error(loaded_.device) : "";
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
        const std::string ours = loaded_.device ? file_->plugin()->last_error(loaded_.device) : "";
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
    if (loaded_.device) {
        const turboquant_kv_stats s = file_->plugin()->stats(loaded_.device);
        m.bytes = static_cast<double>(s.format_bytes);
        m.bytes_per_token = m.f16_bytes_per_token * m.bytes / m.f16_bytes;
    }
    m.bits_per_value = 8 * m.bytes / values;
    return m;
}

std::string Session::config() const {
    const WindowSizes exact = spec_.ours ? spec_.ours->windows.resolve(llama_n_ctx(context())) : WindowSizes{0, 0};
    const std::string cache =
        loaded_.device ? fmt::format("turboquant backend, {}, exact sink={},recent={}", file_->plugin()->config(loaded_.device), exact.sink,
                                     exact.recent)
                       : fmt::format("llama.cpp's own, keys {}, values {}", ggml_type_name(spec_.type_k), ggml_type_name(spec_.type_v));
    return fmt::format("--kv {}: {}; context {}, batch {}/{}, threads {}, flash attention on", spec_.name, cache, llama_n_ctx(context()),
                       llama_n_batch(context()), llama_n_ubatch(context()), options_.n_threads);
}

}  // namespace turboquant::llama
