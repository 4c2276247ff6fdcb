#include "turboquant/ggml/placement.h"

#include <algorithm>

#include "turboquant/ggml/kv_names.h"

namespace turboquant::ggml {
namespace {

/// "0-3, 7".
std::string ranges_text(const std::set<int>& numbers) {
    std::string text;
    for (auto first = numbers.begin(); first != numbers.end();) {
        auto last = first;
        while (std::next(last) != numbers.end() && *std::next(last) == *last + 1) ++last;
        if (!text.empty()) text += ", ";
        text += std::to_string(*first);
        if (last != first) text.append("-").append(std::to_string(*last));
        first = std::next(last);
    }
    return text;
}

constexpr const char* kRemedy =
    " To have it compressed offload all layers (-ngl 99; n_gpu_layers=-1 in Python) and leave out -nkvo; if --fit moved the layers, ask "
    "for a "
    "smaller context or give -fit off";

}  // namespace

std::string Placement::none_here() {
    told_ = true;
    return std::string(
               "the cache of all layers is NOT compressed: it lies elsewhere, as f16 or what -ctk and -ctv say, since no layer is here.") +
           kRemedy;
}

std::string Placement::see(const ggml_tensor* tensor, const std::set<int>& ours) {
    if (told_ || (!seen_.empty() && seen_.back() == tensor)) return {};
    if (std::ranges::find(seen_, tensor) == seen_.end()) {
        seen_.push_back(tensor);
        return {};
    }
    told_ = true;
    std::set<int> foreign;
    double mib = 0;
    for (const ggml_tensor* t : seen_) {
        if (const auto name = parse_kv_name(t->name)) foreign.insert(name->layer);
        mib += static_cast<double>(ggml_nbytes(t)) / (1 << 20);
    }
    std::set<int> all = ours;
    all.insert(foreign.begin(), foreign.end());
    char size[32];
    std::snprintf(size, sizeof size, "%.1f", mib);
    return "the cache of " + std::to_string(foreign.size()) + " of " + std::to_string(all.size()) + " layers (" + ranges_text(foreign) +
           ") is NOT compressed: it lies elsewhere, as " + ggml_type_name(tensor->type) + ", " + size + " MiB." + kRemedy;
}

}  // namespace turboquant::ggml
