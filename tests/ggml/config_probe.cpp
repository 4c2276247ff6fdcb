// Loads the library in a fresh process and says what it offers. usage: config_probe LIBRARY MODEL DEVICE|default
// Exit codes: 0 fine, 3 the library does not load, 1 anything else.
#include <cstdio>
#include <cstring>
#include <memory>

#include "llama.h"
#include "turboquant/ggml/plugin.h"

namespace {

int fail(const char* what, int code = 1) {
    std::printf("config_probe: %s\n", what);
    return code;
}

void log_line(ggml_log_level level, const char* text, void*) {
    if (level == GGML_LOG_LEVEL_ERROR || std::strstr(text, "turboquant")) std::fputs(text, stdout);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return fail("usage: config_probe LIBRARY MODEL DEVICE|default");
    llama_log_set(log_line, nullptr);
    const ggml_backend_reg_t reg = ggml_backend_load(argv[1]);
    if (!reg) return fail("the library does not load", 3);
    ggml_backend_dev_t first = ggml_backend_reg_dev_get(reg, 0);
    std::printf("first device %s\n", ggml_backend_dev_name(first));

    llama_model_params model_params = llama_model_default_params();
    ggml_backend_dev_t devices[2] = {};
    const bool by_name = std::strcmp(argv[3], "default") != 0;
    if (by_name && !(devices[0] = ggml_backend_dev_by_name(argv[3]))) return fail("no such device");
    if (by_name) model_params.devices = devices;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(llama_model_load_from_file(argv[2], model_params),
                                                                          llama_model_free);
    if (!model) return fail("the model does not load");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 512;
    const std::unique_ptr<llama_context, decltype(&llama_free)> ctx(llama_init_from_model(model.get(), params), llama_free);
    if (!ctx) return fail("no context");
    llama_token tokens[] = {1, 2, 3, 4};
    if (llama_decode(ctx.get(), llama_batch_get_one(tokens, 4)) != 0) return fail("decoding failed");

    const ggml_backend_dev_t used = by_name ? devices[0] : first;
    std::printf("%s\n", reinterpret_cast<turboquant_config_t>(ggml_backend_reg_get_proc_address(reg, "turboquant_config"))(used));
    turboquant_kv_stats stats;
    reinterpret_cast<turboquant_kv_stats_t>(ggml_backend_reg_get_proc_address(reg, "turboquant_kv_stats"))(used, &stats);
    std::printf("bits %.3f in %zu tensors\n", stats.bits_per_value, stats.n_tensors);
    return 0;
}
