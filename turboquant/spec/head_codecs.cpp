#include "turboquant/spec/head_codecs.h"

#include <algorithm>
#include <stdexcept>

namespace turboquant {

HeadCodecs::HeadCodecs(std::vector<CodecId> per_head) : all_(per_head.empty() ? CodecId{} : per_head.front()) {
    if (per_head.empty()) throw std::invalid_argument("formats of no heads; name at least one");
    if (std::ranges::adjacent_find(per_head, std::ranges::not_equal_to()) == per_head.end()) return;
    per_head_ = std::move(per_head);
    for (const CodecId id : per_head_)
        if (!mixes(id))
            throw std::invalid_argument("'" + std::string(codec_info(id).name) +
                                        "' cannot stand beside other formats in one layer; those that can: turbo and tcq formats");
}

std::string known_codec_words() {
    std::string out;
    for (const CodecInfo& c : kCodecs) out += (out.empty() ? "" : ", ") + std::string(c.name);
    return out;
}

std::string to_string(const HeadCodecs& codecs) {
    std::string out;
    for (int h = 0; h < codecs.count(); h++) out.append(h ? "/" : "").append(codec_info(codecs.of(h)).name);
    return out;
}

HeadCodecs parse_head_codecs(std::string_view text) {
    std::vector<CodecId> codecs;
    for (std::size_t at = 0; at <= text.size();) {
        const std::size_t end = std::min(text.find('/', at), text.size());
        const std::string_view word = text.substr(at, end - at);
        at = end + 1;
        const auto id = find_codec(word);
        if (!id) throw std::invalid_argument("unknown format '" + std::string(word) + "'; known: " + known_codec_words());
        codecs.push_back(*id);
    }
    return HeadCodecs(std::move(codecs));
}

}  // namespace turboquant
