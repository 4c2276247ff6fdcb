#include "turboquant/planner/allocate.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace turboquant {
namespace {

constexpr std::int64_t kMaxUnits = 1 << 16;

void check(const std::vector<SlotOption>& options) {
    if (options.empty()) throw std::invalid_argument("allocate: a slot has no options");
    if (options.size() > 65535) throw std::invalid_argument("allocate: more than 65535 options for one slot");
    for (const SlotOption& o : options)
        if (!std::isfinite(o.cost) || o.size < 0)
            throw std::invalid_argument("allocate: an option's cost is not a finite number, or its size is negative");
}

std::int64_t least_size(const std::vector<SlotOption>& options) { return std::ranges::min_element(options, {}, &SlotOption::size)->size; }

}  // namespace

Allocation allocate(std::span<const std::vector<SlotOption>> slots, std::int64_t budget) {
    // What every slot needs at least is spent; the search is over what lies above, in units of the common divisor.
    std::int64_t least = 0, most = 0, unit = 0;
    for (const auto& options : slots) {
        check(options);
        const std::int64_t base = least_size(options);
        std::int64_t top = 0;
        for (const SlotOption& o : options) unit = std::gcd(unit, o.size - base), top = std::max(top, o.size - base);
        least += base, most += top;
    }
    if (budget < least)
        throw std::invalid_argument("a budget of " + std::to_string(budget) + " is below the least possible size, " +
                                    std::to_string(least));
    Allocation result;
    const std::int64_t room = std::min(budget - least, most);
    unit = std::max<std::int64_t>(unit, 1);
    if (room / unit > kMaxUnits) unit = (room + kMaxUnits - 1) / kMaxUnits;

    // best[u]: least cost of the slots so far within u units above the least size; chosen[slot][u]: the option it takes there.
    const auto n = static_cast<std::size_t>(room / unit + 1);
    std::vector<double> best(n, 0), next(n);
    std::vector<std::uint16_t> chosen(slots.size() * n);
    const auto units = [unit](const std::vector<SlotOption>& options, std::size_t o) {
        return static_cast<std::size_t>((options[o].size - least_size(options) + unit - 1) / unit);
    };
    for (std::size_t s = 0; s < slots.size(); s++) {
        std::vector<std::size_t> by_size(slots[s].size());
        std::iota(by_size.begin(), by_size.end(), 0u);
        std::ranges::stable_sort(by_size, {}, [&](std::size_t o) { return slots[s][o].size; });
        std::ranges::fill(next, HUGE_VAL);
        for (const std::size_t o : by_size)
            for (std::size_t w = units(slots[s], o), u = w; u < n; u++)
                if (const double cost = best[u - w] + slots[s][o].cost; cost < next[u])
                    next[u] = cost, chosen[s * n + u] = static_cast<std::uint16_t>(o);
        std::swap(best, next);
    }
    result.choice.resize(slots.size());
    std::size_t u = static_cast<std::size_t>(std::ranges::min_element(best) - best.begin());
    for (std::size_t s = slots.size(); s-- > 0;) {
        const std::size_t o = chosen[s * n + u];
        result.choice[s] = o;
        result.size += slots[s][o].size;
        u -= units(slots[s], o);
    }
    for (std::size_t s = 0; s < slots.size(); s++) result.cost += slots[s][result.choice[s]].cost;
    return result;
}

}  // namespace turboquant
