#include "turboquant/spec/words.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace turboquant {
namespace {

constexpr std::string_view kAuto = "auto:";
constexpr double kMostBits = 32;
constexpr std::array<std::pair<std::string_view, double>, 6> kUnits = {
    {{"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}}};

}  // namespace

Budget parse_budget(std::string_view text) {
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const std::string_view unit = text.substr(static_cast<std::size_t>(end - text.data()));
    const auto* known = std::ranges::find(kUnits, unit, &std::pair<std::string_view, double>::first);
    const bool is_number = error == std::errc() && value > 0 && std::isfinite(value);
    if (is_number && unit.empty() && value <= kMostBits) return {value, 0};
    if (is_number && known != kUnits.end()) return {0, value * known->second};
    throw std::invalid_argument("'" + std::string(text) +
                                "' is no budget; give bits per value, like 4.25, or memory, like 512MiB (KiB, MiB, GiB, KB, MB, GB)");
}

bool is_auto_word(std::string_view text) {
    const std::string_view first = text.substr(0, text.find(','));
    return text.starts_with(kAuto) || std::ranges::find(kUnmeasured, first, &UnmeasuredWord::word) != std::end(kUnmeasured);
}

bool is_plan_file_word(std::string_view text) { return text.ends_with(".json"); }

KvWord parse_kv_word(std::string_view text) {
    if (is_auto_word(text)) {
        const std::size_t comma = std::min(text.find(','), text.size());
        const std::string_view word = text.substr(0, comma);
        const auto* unmeasured = std::ranges::find(kUnmeasured, word, &UnmeasuredWord::word);
        const bool measured = unmeasured == std::end(kUnmeasured);
        const Budget budget = measured ? parse_budget(word.substr(kAuto.size())) : Budget{unmeasured->bits, 0};
        if (comma + 1 == text.size())
            throw std::invalid_argument("'" + std::string(text) + "' ends with a comma; name an option behind it, or leave it out");
        return AutoWord{budget, parse_spec_options(comma < text.size() ? text.substr(comma + 1) : std::string_view{}), measured};
    }
    if (is_plan_file_word(text)) return PlanFileWord{std::string(text)};
    return parse_kv_spec(text);
}

std::string auto_name(double bits) {
    std::array<char, 32> text;
    return std::string(kAuto).append(text.data(), std::to_chars(text.data(), text.data() + text.size(), bits).ptr);
}

}  // namespace turboquant
