#include "turboquant/ggml/config.h"

#include <cstdlib>
#include <stdexcept>
#include <variant>

namespace turboquant::ggml {

Config parse_config(const char* text) {
    Config config;
    std::string word;
    for (std::string rest = text; !rest.empty();) {
        const std::size_t comma = std::min(rest.find(','), rest.size());
        const std::string item = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        if (item == "abi=any")
            config.any_abi = true;
        else
            word += (word.empty() ? "" : ",") + item;
    }
    if (word.empty()) return config;
    const KvWord parsed = parse_kv_word(word);
    if (const auto* spec = std::get_if<KvSpec>(&parsed)) {
        config.spec = *spec;
    } else if (const auto* file = std::get_if<PlanFileWord>(&parsed)) {
        config.plan = read_plan_file(file->path);
        config.spec = to_spec(*config.plan);
    } else {
        const auto& automatic = std::get<AutoWord>(parsed);
        if (automatic.budget.bits == 0)
            throw std::invalid_argument(word +
                                        ": give bits per value, like auto:4.25; for a budget in memory make a plan with `turboquant plan "
                                        "--memory` and name its file");
        config.auto_bits = automatic.budget.bits;
        config.spec = uniform_spec(CodecId::raw, CodecId::raw, automatic.options);
    }
    return config;
}

Config load_config() {
    const char* text = std::getenv(kConfigVariable);
    return text ? parse_config(text) : Config{};
}

}  // namespace turboquant::ggml
