// The SPEC of `--kv` as the command understands it: a format of ours, or a cache type of llama.cpp's own.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ggml.h"
#include "turboquant/spec/kv_spec.h"

namespace turboquant::llama {

struct CacheSpec {
    std::string name;            ///< canonical text
    std::optional<KvSpec> ours;  ///< set: a format of ours; then the nominal types below are f16
    double auto_bits = 0;        ///< not 0: formats within so many bits that the library chooses itself, by rules; `ours` has the options
    ggml_type type_k = GGML_TYPE_F16;
    ggml_type type_v = GGML_TYPE_F16;
};

/// What the backend library is told (turboquant_set_spec) of a cache of ours.
std::string device_text(const CacheSpec& spec);

/// llama.cpp's cache types, as its own `--cache-type-k` names them.
std::span<const ggml_type> llama_cache_types();
std::optional<ggml_type> find_llama_type(std::string_view name);
/// "f16, q8_0, ..." for messages.
std::string known_llama_words();

/// Grammar: kv_spec.h's, the words of kUnmeasured with OPTIONs, or TYPE, or "k=TYPE,v=TYPE" with llama.cpp's types. Throws Error naming the unknown word and all known
/// ones; also if one side is llama.cpp's and the other ours.
CacheSpec parse_cache_spec(std::string_view text);
/// Parses all, drops repetitions.
std::vector<CacheSpec> parse_cache_specs(const std::vector<std::string>& texts);

/// Bits a value takes in a type of ggml's: 8*type_size/block_size.
double bits_per_value(ggml_type type);

}  // namespace turboquant::llama
