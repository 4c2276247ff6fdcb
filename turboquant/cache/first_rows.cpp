#include "turboquant/cache/first_rows.h"

#include <algorithm>

#include "turboquant/codec/quantizer.h"

namespace turboquant {
namespace {

// Sorted by row: what is measured must not depend on the order of arrival, not even in its last bit.
template <class Rows>
auto place_of(Rows& rows, std::int64_t row) {
    return std::lower_bound(rows.begin(), rows.end(), row, [](const KeptRow& r, std::int64_t x) { return r.row < x; });
}

}  // namespace

void FirstRows::add(const float* x, std::size_t stride, std::size_t n_embd, std::span<const std::int64_t> rows) {
    for (std::size_t i = 0; i < rows.size() && rows_.size() < kMeasureRows; i++) {
        KeptRow kept{rows[i], -1, std::vector<std::uint16_t>(n_embd)};
        std::transform(x + i * stride, x + i * stride + n_embd, kept.values.begin(), to_half);
        const auto at = place_of(rows_, rows[i]);
        if (at != rows_.end() && at->row == rows[i])
            *at = std::move(kept);
        else
            rows_.insert(at, std::move(kept));
    }
}

const KeptRow* FirstRows::find(std::int64_t row) const {
    const auto at = place_of(rows_, row);
    return at != rows_.end() && at->row == row ? &*at : nullptr;
}

}  // namespace turboquant
