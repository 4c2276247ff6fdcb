#include "turboquant/ggml/decoded_sources.h"

#include <algorithm>

namespace turboquant::ggml {

std::string DecodedSources::decode(StoreContext& ctx, const ggml_tensor* op) {
    node_ = *op;
    for (int j = 0; j < GGML_MAX_SRC; j++) {
        const ggml_tensor* src = op->src[j];
        KvExtra* e = src ? kv_extra(src) : nullptr;
        if (!e) continue;
        if (!e->refused.empty()) return std::string("cannot read '") + root(src)->name + "' with " + ggml_op_desc(op) + ": " + e->refused;
        const auto row_bytes = static_cast<std::size_t>(root(src)->nb[1]);
        const std::size_t first = src->view_offs / row_bytes, end = (src->view_offs + ggml_nbytes(src) + row_bytes - 1) / row_bytes;
        rows_[j].resize((end - first) * row_bytes / sizeof(std::uint16_t));
        if (e->bound()) {
            e->layer->decode(ctx, e->side, static_cast<std::int64_t>(first), static_cast<std::int64_t>(end - first), rows_[j].data());
            static_cast<KvBuffer*>(root(src)->buffer->context)->report_lost(src, e->layer->take_lost());
        } else {
            std::ranges::fill(rows_[j], std::uint16_t{0});  // nothing was written yet
        }
        sources_[j] = *src;
        sources_[j].data = reinterpret_cast<char*>(rows_[j].data()) + (src->view_offs - first * row_bytes);
        node_.src[j] = &sources_[j];
    }
    return {};
}

}  // namespace turboquant::ggml
