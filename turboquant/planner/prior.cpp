#include "turboquant/planner/prior.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "turboquant/codec/tile.h"
#include "turboquant/planner/allocate.h"
#include "turboquant/planner/sensitivity.h"

namespace turboquant {
namespace {

constexpr double kRoomAbove = 2.25;                 // bits: two, and what windows and positions take of a budget
constexpr double kKeysWithOffset = 0.025 / 0.0091;  // beside values, in shallow models
constexpr double kKeysWhenDeep = 8;                 // beside values
constexpr double kGlobalKeys = 16;                  // beside those of layers with sliding windows
constexpr int kShallow = 8, kDeep = 16;             // layers
constexpr double kTieBreak = 1e-6;                  // per rank: too small to outweigh any difference of formats

std::string three_digits(double x) {
    const std::string text = std::to_string(std::ceil(1000 * x) / 1000);
    return text.substr(0, text.find('.') + 4);
}

}  // namespace

std::vector<CodecId> unmeasured_candidates(double bits) {
    std::vector<CodecId> out;
    for (const CodecInfo& c : kCodecs)
        if (!is_composite(c.id) && bits_per_value(c.id, 128) <= bits + kRoomAbove) out.push_back(c.id);
    return out;
}

double key_weight(int n_layers, bool offset_removed) {
    const double depth = std::clamp(static_cast<double>(n_layers - kShallow) / (kDeep - kShallow), 0.0, 1.0);
    return std::pow(kKeysWhenDeep, depth) * (offset_removed ? 1 : kKeysWithOffset);
}

std::vector<CodecId> unmeasured_formats(std::span<const UnmeasuredSlot> slots, double bits, bool offset_removed) {
    const std::vector<CodecId> codecs = unmeasured_candidates(bits);
    std::vector<std::vector<SlotOption>> options;
    double values = 0;
    std::int64_t least = 0;
    const auto n_layers = std::ranges::count(slots, Side::key, &UnmeasuredSlot::side);
    const double keys = key_weight(static_cast<int>(n_layers), offset_removed);
    const std::int64_t fewest = slots.empty() ? 0 : std::ranges::min(slots, {}, &UnmeasuredSlot::n_cells).n_cells;
    for (std::size_t s = 0; s < slots.size(); s++) {
        const UnmeasuredSlot& slot = slots[s];
        const double side = slot.side == Side::value ? 1 : slot.n_cells > fewest ? keys * kGlobalKeys : keys;
        const auto from_end = static_cast<double>(std::min(s, slots.size() - 1 - s) / 2);
        const double weight = side * (1 - kTieBreak * (2 * from_end + (slot.side == Side::value)));
        options.emplace_back();
        std::int64_t smallest = INT64_MAX;
        for (const CodecId c : codecs) {
            const auto size = static_cast<std::int64_t>(tile_bytes({c, slot.side, slot.head_dim})) * slot.n_heads * slot.n_cells;
            options.back().push_back({size, weight * relative_mse(c, Side::key, slot.head_dim) * slot.n_heads * slot.head_dim});
            smallest = std::min(smallest, size);
        }
        least += smallest;
        values += static_cast<double>(slot.head_dim) * slot.n_heads * static_cast<double>(slot.n_cells);
    }
    const double unit = 8.0 / (kTileKeys * values);  // bits per value of a byte in all tiles
    const auto budget = static_cast<std::int64_t>(bits / unit * (1 + 1e-12));
    if (codecs.empty() || budget < least)
        throw std::invalid_argument("a budget of " + three_digits(bits) + " bits per value is below what the smallest formats take" +
                                    (codecs.empty() ? "" : ", " + three_digits(static_cast<double>(least) * unit)));
    std::vector<CodecId> chosen;
    for (const std::size_t o : allocate(options, budget).choice) chosen.push_back(codecs[o]);
    return chosen;
}

}  // namespace turboquant
