#include "tests/ggml/support.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>

#include "tests/codec/temp_dir.h"

namespace turboquant::conformance {
namespace {

std::mutex log_mutex;
std::vector<LogLine> log_lines;

void keep_log(ggml_log_level level, const char* text, void*) {
    const std::scoped_lock lock(log_mutex);
    log_lines.push_back({level, text});
}

/// Written for these tests.
constexpr const char* kSentences[] = {
    "The ferry left at dawn with nine passengers and a crate of pears. ",
    "Nobody had told the captain that the bridge was closed, so he waited, and the fog came in over the water. ",
    "A girl in a green coat counted the gulls on the rail: seven, then twelve, then none at all. ",
    "In the engine room the old man wrote numbers in a book, as he had done every morning for thirty years. ",
    "When the sun came through at last, the whole company stood on deck and looked toward the hills. ",
    "\"We shall be late,\" said the woman with the violin, \"and the concert will begin without us.\" ",
    "It was a small town, with one street, two churches, and a market where they sold rope and honey. ",
    "Her brother had promised to meet them at the pier; he had forgotten, and was asleep under an apple tree. ",
};

}  // namespace

Options& options() {
    static Options all;
    return all;
}

std::vector<LogLine> take_log_lines() {
    const std::scoped_lock lock(log_mutex);
    return std::exchange(log_lines, {});
}

std::string take_log() {
    std::string text;
    for (const LogLine& line : take_log_lines()) text += line.text;
    return text;
}

ggml_backend_reg_t plugin() {
    static const ggml_backend_reg_t reg = [] {
        llama_log_set(keep_log, nullptr);
        llama_backend_init();
        if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) ggml_backend_load_all();
        if (const std::string& gpu = options().gpu_backend; !gpu.empty() && !ggml_backend_load(gpu.c_str()))
            throw std::runtime_error("cannot load " + gpu);
        return ggml_backend_load(options().plugin.empty() ? TQ_PLUGIN_PATH : options().plugin.c_str());
    }();
    if (!reg) throw std::runtime_error("the library does not load: " + take_log());
    return reg;
}

bool on_gpu() { return !options().gpu_backend.empty() || !options().plugin.empty(); }

ggml_backend_dev_t device(const std::string& name) {
    plugin();
    if (name == "f16") return nullptr;
    std::string spec = name;
    constexpr int kLayers = 6;
    if (name.starts_with(kMixed)) {
        spec = "k=turbo4,v=turbo4" + name.substr(kMixed.size());
        for (int layer = 0; layer < kLayers; layer++)
            spec += ",k" + std::to_string(layer) + "=turbo6/tcq4,v" + std::to_string(layer) + "=tcq5/turbo8";
    }
    if (name.starts_with(kScaled)) {
        constexpr int kChannels = 128;
        spec = "turbo8" + name.substr(kScaled.size());
        for (int layer = 0; layer < kLayers; layer++) {
            spec += ",scale" + std::to_string(layer) + "=";
            for (int i = 0; i < kChannels; i++) spec += "SUWYZabcegikZZaa"[(i / 2 + layer) % 16];  // RoPE's pairs alike, adjacent or split
        }
    }
    char error[512] = "";
    const ggml_backend_dev_t dev = procedure<turboquant_device_t>("turboquant_device")(spec.c_str(), error, sizeof error);
    if (!dev) throw std::runtime_error("no device " + name + ": " + error);
    return dev;
}

turboquant_kv_stats kv_stats(const std::string& name) {
    turboquant_kv_stats s{};
    procedure<turboquant_kv_stats_t>("turboquant_kv_stats")(device(name), &s);
    return s;
}

std::string last_error(const std::string& name) { return procedure<turboquant_last_error_t>("turboquant_last_error")(device(name)); }

std::vector<ggml_backend_dev_t> device_list(const std::string& name) {
    if (const ggml_backend_dev_t dev = device(name)) return {dev, nullptr};
    // llama.cpp's own cache lies where ours does.
    if (!options().gpu_backend.empty()) return {ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU), nullptr};
    return {nullptr};
}

ModelPtr load_model(const std::string& path, const std::string& device_name) {
    std::vector<ggml_backend_dev_t> devices = device_list(device_name);
    llama_model_params params = llama_model_default_params();
    params.devices = devices.data();
    params.n_gpu_layers = -1;
    ModelPtr model(llama_model_load_from_file(path.c_str(), params));
    if (!model) throw std::runtime_error(path + " does not load: " + take_log());
    return model;
}

/// Models on devices, freed after the last test: when static objects go, CUDA's driver may have gone before, and llama.cpp's own backend
/// ends the process then.
class Models final : public testing::Environment {
  public:
    void TearDown() override { all.clear(); }
    std::map<std::string, ModelPtr> all;
};
Models& models = *static_cast<Models*>(testing::AddGlobalTestEnvironment(new Models));

llama_model* demo(const std::string& device_name) {
    ModelPtr& model = models.all[device_name];
    if (!model) model = load_model(TQ_DEMO_MODEL, device_name);
    return model.get();
}

std::string shared_model(const std::string& name) {
    const auto path = std::filesystem::path(TQ_SOURCE_DIR) / ".." / "shared" / "models" / name;
    return std::filesystem::exists(path) ? path.string() : std::string();
}

ContextPtr make_context(llama_model* model, const ContextOptions& options) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = options.n_ctx;
    params.n_batch = 2048;
    params.n_ubatch = options.n_ubatch;
    params.n_seq_max = options.n_seq_max;
    params.kv_unified = options.kv_unified;
    params.swa_full = options.swa_full;
    params.flash_attn_type = options.flash_attn;
    params.n_threads = params.n_threads_batch = options.n_threads;
    ContextPtr ctx(llama_init_from_model(model, params));
    if (!ctx) throw std::runtime_error("no context: " + take_log());
    return ctx;
}

std::vector<llama_token> text_tokens(const llama_model* model, int n, int variant) {
    std::string text;
    for (size_t i = 0; text.size() < static_cast<size_t>(n) * 8; i++)
        text += kSentences[(i * (2 * i + 3) + static_cast<size_t>(variant)) % std::size(kSentences)];
    const llama_vocab* vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(text.size());
    const int got =
        llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), tokens.data(), static_cast<int>(tokens.size()), true, false);
    if (got < n) throw std::runtime_error("too little text for " + std::to_string(n) + " tokens");
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

std::vector<llama_token> random_tokens(int n_vocab, int n, uint32_t seed) {
    std::mt19937 random(seed);
    std::vector<llama_token> tokens(static_cast<size_t>(n));
    for (llama_token& t : tokens) t = static_cast<llama_token>(random() % static_cast<uint32_t>(n_vocab));
    return tokens;
}

void Logits::append(const Logits& other) {
    n_vocab = other.n_vocab;
    values.insert(values.end(), other.values.begin(), other.values.end());
}

namespace {

struct Batch {
    llama_batch b;
    explicit Batch(std::span<const BatchToken> tokens) : b(llama_batch_init(static_cast<int>(tokens.size()), 0, 1)) {
        for (const BatchToken& t : tokens) {
            const int i = b.n_tokens++;
            b.token[i] = t.id;
            b.pos[i] = t.pos;
            b.n_seq_id[i] = 1;
            b.seq_id[i][0] = t.seq;
            b.logits[i] = 1;
        }
    }
    ~Batch() { llama_batch_free(b); }
    Batch(const Batch&) = delete;
};

std::vector<BatchToken> consecutive(std::span<const llama_token> tokens, llama_pos pos, llama_seq_id seq) {
    std::vector<BatchToken> all;
    for (const llama_token t : tokens) all.push_back({t, pos++, seq});
    return all;
}

}  // namespace

Logits decode(llama_context* ctx, std::span<const BatchToken> tokens, int step) {
    Logits out{llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))), {}};
    for (size_t at = 0; at < tokens.size();) {
        const size_t n = std::min(tokens.size() - at, static_cast<size_t>(step));
        const Batch batch(tokens.subspan(at, n));
        const int status = llama_decode(ctx, batch.b);
        if (status != 0) throw std::runtime_error("llama_decode returned " + std::to_string(status) + ": " + take_log());
        const float* logits = llama_get_logits(ctx);
        out.values.insert(out.values.end(), logits, logits + n * static_cast<size_t>(out.n_vocab));
        at += n;
    }
    return out;
}

Logits decode(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos, llama_seq_id seq, int step) {
    return decode(ctx, std::span<const BatchToken>(consecutive(tokens, first_pos, seq)), step);
}

Logits feed(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos, llama_seq_id seq, int step) {
    Logits out{llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))), {}};
    for (size_t at = 0; at < tokens.size(); at += static_cast<size_t>(step)) {
        const size_t n = std::min(tokens.size() - at, static_cast<size_t>(step));
        const Batch batch(consecutive(tokens.subspan(at, n), first_pos + static_cast<llama_pos>(at), seq));
        std::fill_n(batch.b.logits, n - 1, int8_t{0});
        if (llama_decode(ctx, batch.b) != 0) throw std::runtime_error("llama_decode fails: " + take_log());
        const float* logits = llama_get_logits_ith(ctx, -1);
        out.values.assign(logits, logits + out.n_vocab);
    }
    return out;
}

int try_decode(llama_context* ctx, std::span<const llama_token> tokens, llama_pos first_pos, llama_seq_id seq) {
    return llama_decode(ctx, Batch(consecutive(tokens, first_pos, seq)).b);
}

llama_token best_token(std::span<const float> logits) {
    return static_cast<llama_token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

std::vector<llama_token> greedy(llama_context* ctx, llama_token token, llama_pos pos, int n, llama_seq_id seq) {
    std::vector<llama_token> said;
    for (int i = 0; i < n; i++) {
        token = best_token(decode(ctx, std::span(&token, 1), pos + i, seq).row(0));
        said.push_back(token);
    }
    return said;
}

double mean_kld(const Logits& reference, const Logits& other) {
    if (reference.values.size() != other.values.size() || reference.values.empty()) throw std::runtime_error("logits of different sizes");
    const auto log_sum = [](std::span<const float> row) {
        const double top = *std::max_element(row.begin(), row.end());
        double sum = 0;
        for (const float x : row) sum += std::exp(x - top);
        return top + std::log(sum);
    };
    double total = 0;
    for (int r = 0; r < reference.rows(); r++) {
        const auto p = reference.row(r), q = other.row(r);
        const double lp = log_sum(p), lq = log_sum(q);
        for (size_t i = 0; i < p.size(); i++) total += std::exp(p[i] - lp) * ((p[i] - lp) - (q[i] - lq));
    }
    return total / reference.rows();
}

double max_difference(const Logits& a, const Logits& b) {
    if (a.values.size() != b.values.size() || a.values.empty()) throw std::runtime_error("logits of different sizes");
    double most = 0;
    for (size_t i = 0; i < a.values.size(); i++) {
        const double d = std::abs(static_cast<double>(a.values[i]) - b.values[i]);
        if (!(d <= most)) most = d;  // a NaN stays
    }
    return most;
}

std::string temp_path(const std::string& file) { return (test::temp_dir() / file).string(); }

}  // namespace turboquant::conformance
