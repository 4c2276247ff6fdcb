#include "tests/ggml/tiny_models.h"

#include <cmath>
#include <memory>
#include <random>
#include <stdexcept>

#include "ggml.h"
#include "gguf.h"

namespace turboquant::conformance {
namespace {

constexpr int kContext = 1024;
constexpr float kKeyBias = 4;

/// Sizes that all models have. Zero KV heads: no attention.
struct Sizes {
    int n_embd, n_head, n_head_kv, head_dim, n_rot, n_ff;
    bool rms = true;
};

TinyModel base(const std::string& name, const std::string& arch, const Sizes& s, int n_layers = 2) {
    TinyModel m{name, arch, n_layers, {}, {}, false, s.head_dim};
    const auto u = [&](const char* key, int value) { m.keys.push_back({key, TinyKey::u32, static_cast<double>(value)}); };
    u("vocab_size", kTinyVocab), u("context_length", kContext), u("embedding_length", s.n_embd), u("block_count", n_layers);
    u("feed_forward_length", s.n_ff), u("attention.head_count", s.n_head), u("attention.head_count_kv", s.n_head_kv);
    if (s.head_dim) u("attention.key_length", s.head_dim), u("attention.value_length", s.head_dim);
    if (s.n_rot) u("rope.dimension_count", s.n_rot);
    m.keys.push_back({s.rms ? "attention.layer_norm_rms_epsilon" : "attention.layer_norm_epsilon", TinyKey::f32, 1e-5});
    m.tensors = {{"token_embd.weight", {s.n_embd, kTinyVocab}, 0, 1},
                 {"output_norm.weight", {s.n_embd}, 1, .1f},
                 {"output.weight", {s.n_embd, kTinyVocab}},
                 {"blk.*.attn_norm.weight", {s.n_embd}, 1, .1f}};
    return m;
}

void add(TinyModel& m, std::vector<TinyTensor> tensors) { m.tensors.insert(m.tensors.end(), tensors.begin(), tensors.end()); }
void remove(TinyModel& m, const std::string& name) {
    std::erase_if(m.tensors, [&](const TinyTensor& t) { return t.name == name; });
}

/// Queries and keys with scores of a few units, values, output; `bias`: of the key projection.
void add_attention(TinyModel& m, const Sizes& s, bool bias, int only_layer = -1) {
    const int q = s.n_head * s.head_dim, kv = s.n_head_kv * s.head_dim;
    const float deviation = 1.5f / std::sqrt(static_cast<float>(s.n_embd));
    add(m, {{"blk.*.attn_q.weight", {s.n_embd, q}, 0, deviation, only_layer},
            {"blk.*.attn_k.weight", {s.n_embd, kv}, 0, deviation, only_layer},
            {"blk.*.attn_v.weight", {s.n_embd, kv}, 0, -1, only_layer},
            {"blk.*.attn_output.weight", {q, s.n_embd}, 0, -1, only_layer}});
    if (bias) {
        m.has_key_bias = true;
        add(m, {{"blk.*.attn_q.bias", {q}, 0, .1f, only_layer},
                {"blk.*.attn_k.bias", {kv}, 0, kKeyBias, only_layer},
                {"blk.*.attn_v.bias", {kv}, 0, .1f, only_layer}});
    }
}

void add_ffn(TinyModel& m, const Sizes& s, bool gate = true) {
    add(m, {{"blk.*.ffn_norm.weight", {s.n_embd}, 1, .1f},
            {"blk.*.ffn_up.weight", {s.n_embd, s.n_ff}},
            {"blk.*.ffn_down.weight", {s.n_ff, s.n_embd}}});
    if (gate) add(m, {{"blk.*.ffn_gate.weight", {s.n_embd, s.n_ff}}});
}

/// Biases of models with layer norm.
void add_biases(TinyModel& m, const Sizes& s, bool ffn_norm = true) {
    add(m, {{"output_norm.bias", {s.n_embd}, 0, .1f},
            {"blk.*.attn_norm.bias", {s.n_embd}, 0, .1f},
            {"blk.*.attn_output.bias", {s.n_embd}, 0, .1f},
            {"blk.*.ffn_up.bias", {s.n_ff}, 0, .1f},
            {"blk.*.ffn_down.bias", {s.n_embd}, 0, .1f}});
    if (ffn_norm) add(m, {{"blk.*.ffn_norm.bias", {s.n_embd}, 0, .1f}});
}

TinyModel llama(const std::string& name, int head_dim) {
    const Sizes s{.n_embd = 4 * head_dim, .n_head = 4, .n_head_kv = 2, .head_dim = head_dim, .n_rot = head_dim, .n_ff = 256};
    TinyModel m = base(name, "llama", s);
    add_attention(m, s, true);
    add_ffn(m, s);
    // Frequency factors, as Llama 3.1 has them.
    m.tensors.push_back({"rope_freqs.weight", {head_dim / 2}, 3, .5f});
    return m;
}

TinyModel qwen2(bool yarn) {
    const Sizes s{.n_embd = 256, .n_head = 2, .n_head_kv = 1, .head_dim = 128, .n_rot = 128, .n_ff = 256};
    TinyModel m = base(yarn ? "qwen2_yarn" : "qwen2", "qwen2", s);
    add_attention(m, s, true);
    add_ffn(m, s);
    if (yarn) {
        m.keys.push_back({"rope.scaling.type", TinyKey::text, 0, "yarn"});
        m.keys.push_back({"rope.scaling.factor", TinyKey::f32, 4});
        m.keys.push_back({"rope.scaling.original_context_length", TinyKey::u32, 256});
    }
    return m;
}

TinyModel qwen2vl() {
    TinyModel m = qwen2(false);
    m.name = m.arch = "qwen2vl";
    m.keys.push_back({"rope.dimension_sections", TinyKey::i32_array, 0, {}, {16, 24, 24, 0}});
    return m;
}

TinyModel without_rope(const std::string& arch) {
    const Sizes s{.n_embd = 256, .n_head = 4, .n_head_kv = 4, .head_dim = 64, .n_rot = 0, .n_ff = 256, .rms = false};
    TinyModel m = base(arch, arch, s);
    add_ffn(m, s, false);
    add_biases(m, s);
    add(m, {{"blk.*.attn_qkv.weight", {256, 3 * 256}, 0, 1.2f / 16},
            {"blk.*.attn_qkv.bias", {3 * 256}, 0, .2f},
            {"blk.*.attn_output.weight", {256, 256}}});
    if (arch == "gpt2") add(m, {{"position_embd.weight", {256, kContext}, 0, .3f}});
    if (arch == "mpt") m.keys.push_back({"attention.max_alibi_bias", TinyKey::f32, 8});
    return m;
}

/// Rotates 32 of 80 dims.
TinyModel phi2() {
    const Sizes s{.n_embd = 320, .n_head = 4, .n_head_kv = 4, .head_dim = 80, .n_rot = 32, .n_ff = 256, .rms = false};
    TinyModel m = base("phi2", "phi2", s);
    add_attention(m, s, true);
    add_ffn(m, s, false);
    remove(m, "blk.*.ffn_norm.weight");
    add_biases(m, s, false);
    add(m, {{"output.bias", {kTinyVocab}, 0, .1f}});
    return m;
}

TinyModel gemma(const std::string& arch) {
    const Sizes s{.n_embd = 256, .n_head = 2, .n_head_kv = 1, .head_dim = 256, .n_rot = 256, .n_ff = 256};
    TinyModel m = base(arch, arch, s, 4);
    add_attention(m, s, arch == "gemma2");
    add_ffn(m, s);
    m.keys.push_back({"attention.sliding_window", TinyKey::u32, 100});
    add(m, {{"blk.*.post_attention_norm.weight", {256}, 1, .1f}, {"blk.*.post_ffw_norm.weight", {256}, 1, .1f}});
    if (arch == "gemma2") {
        remove(m, "output.weight");
        m.tensors.front().deviation = .1f;  // the output is tied to it
        m.keys.push_back({"attn_logit_softcapping", TinyKey::f32, 20});
        m.keys.push_back({"final_logit_softcapping", TinyKey::f32, 30});
    } else {
        m.keys.push_back({"attention.sliding_window_pattern", TinyKey::u32, 2});
        m.keys.push_back({"rope.freq_base", TinyKey::f32, 1e6});
        m.keys.push_back({"rope.freq_base_swa", TinyKey::f32, 1e4});
        add(m, {{"blk.*.attn_q_norm.weight", {256}, 1, .3f}, {"blk.*.attn_k_norm.weight", {256}, 1, .3f}});
    }
    return m;
}

/// Sinks, sliding windows, experts.
TinyModel gpt_oss() {
    const Sizes s{.n_embd = 256, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .n_rot = 64, .n_ff = 128};
    TinyModel m = base("gpt_oss", "gpt-oss", s, 4);
    add_attention(m, s, true);
    m.keys.push_back({"attention.sliding_window", TinyKey::u32, 100});
    for (const auto& [key, value] : {std::pair("expert_count", 4), {"expert_used_count", 2}, {"expert_feed_forward_length", 128}})
        m.keys.push_back({key, TinyKey::u32, static_cast<double>(value)});
    add(m, {{"blk.*.post_attention_norm.weight", {256}, 1, .1f},
            {"blk.*.attn_output.bias", {256}, 0, .1f},
            {"blk.*.attn_sinks.weight", {4}, 2, 1},
            {"blk.*.ffn_gate_inp.weight", {256, 4}},
            {"blk.*.ffn_gate_inp.bias", {4}, 0, .1f},
            {"blk.*.ffn_gate_exps.weight", {256, 128, 4}},
            {"blk.*.ffn_gate_exps.bias", {128, 4}, 0, .1f},
            {"blk.*.ffn_up_exps.weight", {256, 128, 4}},
            {"blk.*.ffn_up_exps.bias", {128, 4}, 0, .1f},
            {"blk.*.ffn_down_exps.weight", {128, 256, 4}},
            {"blk.*.ffn_down_exps.bias", {256, 4}, 0, .1f}});
    return m;
}

/// Multi-head latent attention: one KV head of 512 + 64, whose first 512 dims are the values.
TinyModel deepseek2() {
    Sizes s{.n_embd = 256, .n_head = 4, .n_head_kv = 1, .head_dim = 576, .n_rot = 64, .n_ff = 256};
    TinyModel m = base("deepseek2", "deepseek2", s);
    for (TinyKey& k : m.keys)
        if (k.name == "attention.value_length") k.number = 512;
    for (const auto& [key, value] : {std::pair("attention.key_length_mla", 128),
                                     {"attention.value_length_mla", 64},
                                     {"attention.q_lora_rank", 64},
                                     {"attention.kv_lora_rank", 512},
                                     {"leading_dense_block_count", 2},
                                     {"expert_count", 2},
                                     {"expert_used_count", 1},
                                     {"expert_shared_count", 1},
                                     {"expert_feed_forward_length", 64}})
        m.keys.push_back({key, TinyKey::u32, static_cast<double>(value)});
    add_ffn(m, s);
    add(m, {{"blk.*.attn_q_a_norm.weight", {64}, 1, .1f},
            {"blk.*.attn_kv_a_norm.weight", {512}, 1, .1f},
            {"blk.*.attn_q_a.weight", {256, 64}},
            {"blk.*.attn_q_b.weight", {64, 4 * 128}, 0, .2f},
            {"blk.*.attn_kv_a_mqa.weight", {256, 512 + 64}},
            {"blk.*.attn_k_b.weight", {64, 512, 4}},
            {"blk.*.attn_v_b.weight", {512, 64, 4}},
            {"blk.*.attn_output.weight", {4 * 64, 256}}});
    return m;
}

/// One KV head, handed over as a slice of a fused projection.
TinyModel starcoder() {
    const Sizes s{.n_embd = 256, .n_head = 4, .n_head_kv = 1, .head_dim = 64, .n_rot = 0, .n_ff = 256, .rms = false};
    TinyModel m = base("starcoder", "starcoder", s);
    add_ffn(m, s, false);
    add_biases(m, s);
    add(m, {{"position_embd.weight", {256, kContext}, 0, .3f},
            {"blk.*.attn_qkv.weight", {256, 6 * 64}, 0, .09f},
            {"blk.*.attn_qkv.bias", {6 * 64}, 0, .2f},
            {"blk.*.attn_output.weight", {256, 256}}});
    return m;
}

/// Heads of 256 in the window and of 512 beyond it; the last `n_shared` layers read the caches of earlier ones and write none; values of
/// the layers beyond the window are made from the keys' projection.
TinyModel gemma4(const std::string& name, int n_shared) {
    const Sizes s{.n_embd = 256, .n_head = 2, .n_head_kv = 1, .head_dim = 512, .n_rot = 512, .n_ff = 256};
    TinyModel m = base(name, "gemma4", s, 6);
    remove(m, "output.weight");
    m.tensors.front().deviation = .1f;
    const std::vector<int32_t> window{1, 1, 1, 0, 1, 0};
    for (const auto& [key, value] : {std::pair("attention.key_length_swa", 256),
                                     {"attention.value_length_swa", 256},
                                     {"attention.sliding_window", 64},
                                     {"attention.shared_kv_layers", n_shared},
                                     {"embedding_length_per_layer_input", 0},
                                     {"rope.dimension_count_swa", 256}})
        m.keys.push_back({key, TinyKey::u32, static_cast<double>(value)});
    m.keys.push_back({"attention.sliding_window_pattern", TinyKey::bool_array, 0, {}, window});
    m.keys.push_back({"rope.freq_base_swa", TinyKey::f32, 1e4});
    m.keys.push_back({"final_logit_softcapping", TinyKey::f32, 30});
    add_ffn(m, s);
    add(m, {{"rope_freqs.weight", {256}, 1.5f, .1f},
            {"blk.*.post_attention_norm.weight", {256}, 1, .1f},
            {"blk.*.post_ffw_norm.weight", {256}, 1, .1f}});
    for (int layer = 0; layer < 6; layer++) {
        const int d = window[layer] ? 256 : 512;
        add(m, {{"blk.*.attn_q.weight", {256, 2 * d}, 0, -1, layer},
                {"blk.*.attn_q_norm.weight", {d}, 1, .1f, layer},
                {"blk.*.attn_output.weight", {2 * d, 256}, 0, -1, layer}});
        if (layer >= 6 - n_shared) continue;
        add(m, {{"blk.*.attn_k.weight", {256, d}, 0, -1, layer}, {"blk.*.attn_k_norm.weight", {d}, .2f, .02f, layer}});
        if (window[layer]) add(m, {{"blk.*.attn_v.weight", {256, d}, 0, -1, layer}});
    }
    return m;
}

/// A recurrent layer (its state is no KV cache) before each attention layer.
TinyModel lfm2() {
    const Sizes s{.n_embd = 256, .n_head = 4, .n_head_kv = 2, .head_dim = 64, .n_rot = 64, .n_ff = 256};
    TinyModel m = base("lfm2", "lfm2", s, 4);
    std::erase_if(m.keys, [](const TinyKey& k) { return k.name == "attention.head_count_kv"; });
    m.keys.push_back({"attention.head_count_kv", TinyKey::i32_array, 0, {}, {0, 2, 0, 2}});
    m.keys.push_back({"shortconv.l_cache", TinyKey::u32, 3});
    remove(m, "output_norm.weight");
    m.tensors.push_back({"token_embd_norm.weight", {256}, 1, .1f});
    add_ffn(m, s);
    for (const int layer : {1, 3}) {
        add_attention(m, s, false, layer);
        add(m, {{"blk.*.attn_q_norm.weight", {64}, 1, .1f, layer}, {"blk.*.attn_k_norm.weight", {64}, 1, .1f, layer}});
    }
    for (const int layer : {0, 2})
        add(m, {{"blk.*.shortconv.conv.weight", {3, 256}, 0, -1, layer},
                {"blk.*.shortconv.in_proj.weight", {256, 3 * 256}, 0, -1, layer},
                {"blk.*.shortconv.out_proj.weight", {256, 256}, 0, -1, layer}});
    return m;
}

/// No attention at all.
TinyModel mamba() {
    TinyModel m = base("mamba", "mamba", {.n_embd = 64, .n_head = 0, .n_head_kv = 0, .head_dim = 0, .n_rot = 0, .n_ff = 0});
    for (const auto& [key, value] :
         {std::pair("ssm.conv_kernel", 4), {"ssm.inner_size", 128}, {"ssm.state_size", 16}, {"ssm.time_step_rank", 4}})
        m.keys.push_back({key, TinyKey::u32, static_cast<double>(value)});
    add(m, {{"blk.*.ssm_in.weight", {64, 256}},
            {"blk.*.ssm_conv1d.weight", {4, 128}},
            {"blk.*.ssm_conv1d.bias", {128}, 0, .1f},
            {"blk.*.ssm_x.weight", {128, 4 + 32}},
            {"blk.*.ssm_dt.weight", {4, 128}},
            {"blk.*.ssm_dt.bias", {128}, 0, .1f},
            {"blk.*.ssm_a", {16, 128}, -1, .1f},
            {"blk.*.ssm_d", {128}, 1, .1f},
            {"blk.*.ssm_out.weight", {128, 64}}});
    return m;
}

}  // namespace

const std::vector<TinyModel>& tiny_models() {
    static const std::vector<TinyModel> all = {llama("llama_80", 80),
                                               llama("llama_96", 96),
                                               llama("llama_112", 112),
                                               llama("llama_192", 192),
                                               qwen2(false),
                                               qwen2(true),
                                               qwen2vl(),
                                               without_rope("gpt2"),
                                               without_rope("mpt"),
                                               phi2(),
                                               gemma("gemma2"),
                                               gemma("gemma3"),
                                               gpt_oss(),
                                               starcoder(),
                                               gemma4("gemma4", 2),
                                               deepseek2(),
                                               lfm2(),
                                               mamba()};
    return all;
}

TinyModel gemma4_with_own_caches() { return gemma4("gemma4_own", 0); }
TinyModel unsupported_model() { return llama("llama_40", 40); }

std::string write_tiny_model(const TinyModel& m, const std::string& folder) {
    const std::string path = folder + "/" + m.name + ".gguf";
    gguf_context* file = gguf_init_empty();
    gguf_set_val_str(file, "general.architecture", m.arch.c_str());
    gguf_set_val_str(file, "general.name", m.name.c_str());
    gguf_set_val_str(file, "tokenizer.ggml.model", "no_vocab");
    for (const TinyKey& k : m.keys) {
        const std::string name = m.arch + "." + k.name;
        switch (k.type) {
            case TinyKey::u32:
                gguf_set_val_u32(file, name.c_str(), static_cast<uint32_t>(k.number));
                break;
            case TinyKey::f32:
                gguf_set_val_f32(file, name.c_str(), static_cast<float>(k.number));
                break;
            case TinyKey::text:
                gguf_set_val_str(file, name.c_str(), k.string.c_str());
                break;
            case TinyKey::i32_array:
                gguf_set_arr_data(file, name.c_str(), GGUF_TYPE_INT32, k.array.data(), k.array.size());
                break;
            case TinyKey::bool_array:
                gguf_set_arr_data(file, name.c_str(), GGUF_TYPE_BOOL, std::vector<int8_t>(k.array.begin(), k.array.end()).data(),
                                  k.array.size());
                break;
        }
    }
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> ctx(ggml_init({size_t{64} << 20, nullptr, false}), ggml_free);
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto write = [&](const TinyTensor& t, const std::string& name) {
        ggml_tensor* tensor = ggml_new_tensor(ctx.get(), GGML_TYPE_F32, static_cast<int>(t.ne.size()), t.ne.data());
        ggml_set_name(tensor, name.c_str());
        const float deviation = t.deviation >= 0 ? t.deviation : 1 / std::sqrt(static_cast<float>(t.ne[0]));
        auto* values = static_cast<float*>(tensor->data);
        for (int64_t i = 0; i < ggml_nelements(tensor); i++) values[i] = t.mean + deviation * normal(random);
        gguf_add_tensor(file, tensor);
    };
    for (const TinyTensor& t : m.tensors) {
        const size_t star = t.name.find('*');
        for (int layer = 0; layer < (star == std::string::npos ? 1 : m.n_layers); layer++) {
            if (t.only_layer >= 0 && t.only_layer != layer) continue;
            std::string name = t.name;
            if (star != std::string::npos) name.replace(star, 1, std::to_string(layer));
            write(t, name);
        }
    }
    const bool written = gguf_write_to_file(file, path.c_str(), false);
    gguf_free(file);
    if (!written) throw std::runtime_error("cannot write " + path);
    return path;
}

}  // namespace turboquant::conformance
