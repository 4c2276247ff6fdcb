#include "turboquant/cache/kv_spec.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace turboquant {
namespace {

constexpr std::array<std::pair<std::string_view, NormMode>, 3> kNormModes = {
    {{"raw", NormMode::raw}, {"corrected", NormMode::corrected}, {"eden", NormMode::eden}}};

CodecId codec_word(std::string_view word) {
    if (const auto id = find_codec(word)) return *id;
    throw std::invalid_argument("unknown KV format '" + std::string(word) + "'; known: " + known_codec_words() +
                                ", or k=WORD,v=WORD[,norm=raw|corrected|eden]");
}

NormMode norm_word(std::string_view word) {
    for (const auto& [name, mode] : kNormModes)
        if (name == word) return mode;
    throw std::invalid_argument("unknown norm mode '" + std::string(word) + "'; known: raw, corrected, eden");
}

}  // namespace

std::string known_codec_words() {
    std::string out;
    for (const CodecInfo& c : kCodecs) out += (out.empty() ? "" : ", ") + std::string(c.name);
    return out;
}

KvSpec parse_kv_spec(std::string_view text) {
    KvSpec spec;
    bool have_k = false, have_v = false;
    if (text.empty()) throw std::invalid_argument("empty KV format; known: " + known_codec_words());
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t comma = std::min(text.find(',', at), text.size());
        const std::string_view item = text.substr(at, comma - at);
        at = comma + 1;
        const std::size_t eq = item.find('=');
        const std::string_view key = eq == item.npos ? std::string_view{} : item.substr(0, eq);
        const std::string_view word = eq == item.npos ? item : item.substr(eq + 1);
        if (eq == item.npos || key == "k") spec.k = codec_word(word), have_k = true;
        if (eq == item.npos || key == "v") spec.v = codec_word(word), have_v = true;
        if (key == "norm") spec.norm_mode = norm_word(word);
        if (eq != item.npos && key != "k" && key != "v" && key != "norm")
            throw std::invalid_argument("unknown key '" + std::string(key) + "' in KV format '" + std::string(text) + "'; known: k, v, norm");
    }
    if (!have_k || !have_v)
        throw std::invalid_argument("KV format '" + std::string(text) + "' names only one side; give both: k=WORD,v=WORD");
    return spec;
}

std::string to_string(const KvSpec& spec) {
    const std::string k(codec_info(spec.k).name), v(codec_info(spec.v).name);
    if (spec.norm_mode == NormMode::corrected) return spec.k == spec.v ? k : "k=" + k + ",v=" + v;
    for (const auto& [name, mode] : kNormModes)
        if (mode == spec.norm_mode) return "k=" + k + ",v=" + v + ",norm=" + std::string(name);
    return k;
}

}  // namespace turboquant
