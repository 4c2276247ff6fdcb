#include "turboquant/llama/cache_spec.h"

#include <algorithm>
#include <stdexcept>

#include "fmt/format.h"
#include "turboquant/llama/error.h"
#include "turboquant/spec/words.h"

namespace turboquant::llama {
namespace {

constexpr ggml_type kLlamaTypes[] = {GGML_TYPE_F16,  GGML_TYPE_F32,  GGML_TYPE_BF16, GGML_TYPE_Q8_0,  GGML_TYPE_Q5_1,
                                     GGML_TYPE_Q5_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL};

/// The words after k= and v=, or the single word for both; empty where a side is not named.
struct Sides {
    std::string_view k, v;
};

Sides split_sides(std::string_view text) {
    Sides s;
    if (text.find('=') == text.npos) return {text, text};
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t comma = std::min(text.find(',', at), text.size());
        const std::string_view item = text.substr(at, comma - at);
        if (item.starts_with("k=")) s.k = item.substr(2);
        if (item.starts_with("v=")) s.v = item.substr(2);
        at = comma + 1;
    }
    return s;
}

std::string known() {
    return fmt::format(
        "known formats of turboquant: auto4, auto3, auto2, {} (or k=WORD,v=WORD and more: docs/cli.md); llama.cpp's own cache types: {} "
        "(or k=TYPE,v=TYPE)",
        known_codec_words(), known_llama_words());
}

}  // namespace

std::span<const ggml_type> llama_cache_types() { return kLlamaTypes; }

std::optional<ggml_type> find_llama_type(std::string_view name) {
    for (const ggml_type t : kLlamaTypes)
        if (name == ggml_type_name(t)) return t;
    return std::nullopt;
}

std::string known_llama_words() {
    std::string out;
    for (const ggml_type t : kLlamaTypes) out += (out.empty() ? "" : ", ") + std::string(ggml_type_name(t));
    return out;
}

std::string device_text(const CacheSpec& spec) {
    if (spec.auto_bits == 0) return to_string(*spec.ours);
    const std::string options = to_string(spec.ours->options());
    return auto_name(spec.auto_bits) + (options.empty() ? "" : "," + options);
}

CacheSpec parse_cache_spec(std::string_view text) {
    if (is_auto_word(text)) {
        const auto word = std::get<AutoWord>(parse_kv_word(text));
        if (word.measured) throw Error(fmt::format("'{}' is measured on a model; it is no format by itself", text));
        return {.name = std::string(text), .ours = uniform_spec(CodecId::raw, CodecId::raw, word.options), .auto_bits = word.budget.bits};
    }
    const Sides sides = split_sides(text);
    const auto k = find_llama_type(sides.k), v = find_llama_type(sides.v);
    CacheSpec spec;
    if (k && v) {
        spec.type_k = *k, spec.type_v = *v;
        spec.name = *k == *v ? std::string(sides.k) : fmt::format("k={},v={}", sides.k, sides.v);
        if (sides.k.data() != sides.v.data() && text.size() != 5 + sides.k.size() + sides.v.size())
            throw Error(fmt::format("'{}': llama.cpp's cache types take no options beside k= and v=", text));
        return spec;
    }
    if ((k && find_codec(sides.v)) || (v && find_codec(sides.k)))
        throw Error(
            fmt::format("'{}' mixes a cache type of llama.cpp's with a format of turboquant, which live in different memory; "
                        "give both sides from one list. For an uncompressed side beside a compressed one use 'raw'",
                        text));
    try {
        spec.ours = parse_kv_spec(text);
    } catch (const std::invalid_argument&) {
        // parse_kv_spec knows only our words: add the other list where a word is the trouble, keep its text where the form is.
        const auto unknown = [](std::string_view w) { return !w.empty() && !find_codec(w) && !find_llama_type(w); };
        if (text.empty() || unknown(sides.k) || unknown(sides.v)) throw Error(fmt::format("unknown KV format '{}'; {}", text, known()));
        throw;
    }
    spec.name = to_string(*spec.ours);
    return spec;
}

std::vector<CacheSpec> parse_cache_specs(const std::vector<std::string>& texts) {
    std::vector<CacheSpec> specs;
    for (const std::string& text : texts) {
        CacheSpec spec = parse_cache_spec(text);
        if (std::ranges::none_of(specs, [&](const CacheSpec& s) { return s.name == spec.name; })) specs.push_back(std::move(spec));
    }
    return specs;
}

double bits_per_value(ggml_type type) {
    return 8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
}

}  // namespace turboquant::llama
