#include "turboquant/cache/outlier_channels.h"

#include <algorithm>
#include <numeric>

namespace turboquant {

OutlierChannels::OutlierChannels(CodecId codec, int n_head, int head_dim, float ratio)
    : n_head_(n_head),
      head_dim_(head_dim),
      ratio_(codec_info(codec).family == Family::split ? 0 : ratio),
      mask_(static_cast<std::size_t>(n_head) * head_dim) {
    reset();
}

void OutlierChannels::reset() {
    frozen_ = false;
    mark(std::vector<double>(mask_.size()), ratio_ == 0 ? head_dim_ / 4 : 0);
}

void OutlierChannels::measure(std::span<const float> rows) {
    std::vector<double> energy(mask_.size());
    for (std::size_t i = 0; i < rows.size(); i++) energy[i % energy.size()] += static_cast<double>(rows[i]) * rows[i];
    if (ratio_ == 0) return mark(energy, head_dim_ / 4);
    std::size_t found = 0;
    for (int h = 0; h < n_head_; h++) {
        const auto head = std::span(energy).subspan(static_cast<std::size_t>(h) * head_dim_, head_dim_);
        std::vector<double> sorted(head.begin(), head.end());
        std::nth_element(sorted.begin(), sorted.begin() + head_dim_ / 2, sorted.end());
        const double limit = sorted[head_dim_ / 2] * ratio_ * ratio_;
        found += std::count_if(head.begin(), head.end(), [&](double e) { return e > limit; });
    }
    mark(energy, std::min(static_cast<int>(found / n_head_), head_dim_ / 2));
}

void OutlierChannels::mark(std::span<const double> energy, int count) {
    count_ = count;
    std::fill(mask_.begin(), mask_.end(), std::uint8_t{0});
    for (int h = 0; h < n_head_; h++) {
        const std::size_t first = static_cast<std::size_t>(h) * head_dim_;
        std::vector<int> order(head_dim_);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return energy[first + a] > energy[first + b]; });
        for (int i = 0; i < count; i++) mask_[first + order[i]] = 1;
    }
}

}  // namespace turboquant
