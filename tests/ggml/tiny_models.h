// Small models of random weights, one for each way in which llama.cpp's architectures use the KV cache: kinds of RoPE, none, ALiBi, sinks,
// soft-cap, sliding windows, MLA, recurrent layers. They say nothing sensible, but their logits show whether attention is computed right.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turboquant::conformance {

inline constexpr int kTinyVocab = 256;

struct TinyKey {
    std::string name;  ///< without the architecture, which is put before it
    enum Type { u32, f32, text, i32_array, bool_array } type = u32;
    double number = 0;
    std::string string{};
    std::vector<int32_t> array{};
};

struct TinyTensor {
    std::string name;         ///< "*" stands for the layer
    std::vector<int64_t> ne;  ///< weights: [in, out]
    float mean = 0;
    float deviation = -1;  ///< negative: 1/sqrt(in)
    int only_layer = -1;   ///< -1: in all of them
};

struct TinyModel {
    std::string name, arch;
    int n_layers = 2;
    std::vector<TinyKey> keys;
    std::vector<TinyTensor> tensors;
    bool has_key_bias = false;  ///< keys with a large constant part before RoPE, which offset removal must find
    int head_dim = 64;
};

/// Those that must work.
const std::vector<TinyModel>& tiny_models();
/// Heads of 40, for which there is no format.
TinyModel unsupported_model();
/// gemma4, of which no layer reads the cache of another one.
TinyModel gemma4_with_own_caches();

/// Writes a GGUF file to a folder and returns its path. The same weights each time. Throws std::runtime_error.
std::string write_tiny_model(const TinyModel& model, const std::string& folder);

}  // namespace turboquant::conformance
