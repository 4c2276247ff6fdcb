#include "turboquant/ggml/config.h"

#include <charconv>
#include <cstdlib>
#include <stdexcept>

namespace turboquant::ggml {
namespace {

constexpr std::string_view kAuto = "auto:";

double parse_bits(std::string_view word) {
    double bits = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), bits);
    if (error == std::errc() && end == word.data() + word.size() && bits > 0 && bits <= 32) return bits;
    throw std::invalid_argument("auto:" + std::string(word) +
                                ": give bits per value, like auto:4.25; for a budget in memory make a plan with `turboquant plan --memory` "
                                "and name its file");
}

}  // namespace

std::string auto_name(double bits) {
    char text[32];
    return std::string(kAuto).append(text, std::to_chars(text, text + sizeof text, bits).ptr);
}

Config parse_config(const char* text) {
    Config config;
    std::string spec;
    for (std::string rest = text; !rest.empty();) {
        const std::size_t comma = std::min(rest.find(','), rest.size());
        const std::string item = rest.substr(0, comma);
        rest.erase(0, comma + 1);
        if (item == "abi=any")
            config.any_abi = true;
        else if (item.starts_with(kAuto) && spec.empty())
            config.auto_bits = parse_bits(std::string_view(item).substr(kAuto.size())), spec = "k=raw,v=raw";
        else
            spec += (spec.empty() ? "" : ",") + item;
    }
    if (spec.ends_with(".json")) {
        config.plan = read_plan_file(spec);
        spec = spec_text(*config.plan);
    }
    if (!spec.empty()) config.spec = parse_kv_spec(spec);
    return config;
}

Config load_config() {
    const char* text = std::getenv(kConfigVariable);
    return text ? parse_config(text) : Config{};
}

}  // namespace turboquant::ggml
