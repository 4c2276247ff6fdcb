#include "turboquant/ggml/config.h"

#include <cstdlib>

namespace turboquant::ggml {

Config parse_config(const char* text) {
    Config config;
    std::string spec;
    for (std::string rest = text; !rest.empty();) {
        const std::size_t comma = std::min(rest.find(','), rest.size());
        const std::string item = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        if (item == "abi=any")
            config.any_abi = true;
        else
            spec += (spec.empty() ? "" : ",") + item;
    }
    if (!spec.empty()) config.spec = parse_kv_spec(spec);
    return config;
}

Config load_config() {
    const char* text = std::getenv(kConfigVariable);
    return text ? parse_config(text) : Config{};
}

}  // namespace turboquant::ggml
