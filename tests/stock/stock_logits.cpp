// A program that knows nothing of turboquant: it links libllama only, has ggml load what GGML_BACKEND_PATH names, decodes a text on a
// device and writes all logits to a file. usage: stock_logits MODEL DEVICE TEXT-FILE N-CTX LOGITS-FILE; prints the KV buffers' size in MiB.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

namespace {

double kv_mib = 0;

void log_line(ggml_log_level level, const char* text, void*) {
    if (const char* size = std::strstr(text, "KV buffer size = ")) kv_mib += std::atof(size + std::strlen("KV buffer size = "));
    if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

int fail(const char* what) {
    std::fprintf(stderr, "stock_logits: %s\n", what);
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 6) return fail("usage: stock_logits MODEL DEVICE TEXT-FILE N-CTX LOGITS-FILE");
    llama_log_set(log_line, nullptr);
    ggml_backend_load_all();
    ggml_backend_dev_t devices[] = {ggml_backend_dev_by_name(argv[2]), nullptr};
    if (!devices[0]) return fail("no such device; is GGML_BACKEND_PATH set?");
    llama_model_params model_params = llama_model_default_params();
    model_params.devices = devices;
    model_params.n_gpu_layers = -1;
    llama_model* model = llama_model_load_from_file(argv[1], model_params);
    if (!model) return fail("the model does not load");

    std::ifstream in(argv[3], std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    const llama_vocab* vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(text.size() + 8);
    const int n =
        llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), tokens.data(), static_cast<int>(tokens.size()), true, true);
    if (n <= 0) return fail("no tokens");

    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<unsigned>(std::atoi(argv[4]));
    params.n_batch = 2048;
    params.n_threads = params.n_threads_batch = 2;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context* context = llama_init_from_model(model, params);
    if (!context) return fail("no context");
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = tokens[static_cast<std::size_t>(i)];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(context, batch) != 0) return fail("decoding failed");
    std::ofstream(argv[5], std::ios::binary)
        .write(reinterpret_cast<const char*>(llama_get_logits(context)),
               static_cast<std::streamsize>(sizeof(float)) * n * llama_vocab_n_tokens(vocab));
    std::printf("%.2f\n", kv_mib);
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
