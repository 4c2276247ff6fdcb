#include "turboquant/ggml/decoded_sources.h"

#include <algorithm>

namespace turboquant::ggml {

std::string DecodedSources::decode(const Device& device, StoreContext& ctx, const ggml_tensor* op) {
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
        char* data = reinterpret_cast<char*>(rows_[j].data());
        if (!device.on_host()) {
            const std::size_t bytes = rows_[j].size() * sizeof rows_[j][0];
            if (!copies_[j] || ggml_backend_buffer_get_size(copies_[j].get()) < bytes)
                copies_[j].reset(ggml_backend_buft_alloc_buffer(ggml_backend_dev_buffer_type(device.gpu->wrapped()), bytes));
            if (!copies_[j]) return std::string("no memory for decoded rows of '") + root(src)->name + "'";
            sources_[j].data = ggml_backend_buffer_get_base(copies_[j].get());
            sources_[j].buffer = copies_[j].get(), sources_[j].view_src = nullptr, sources_[j].extra = nullptr;
            ggml_tensor whole = sources_[j];  // the rows as one line of bytes
            whole.type = GGML_TYPE_I8, whole.ne[0] = static_cast<std::int64_t>(bytes), whole.ne[1] = whole.ne[2] = whole.ne[3] = 1;
            whole.nb[0] = 1, whole.nb[1] = whole.nb[2] = whole.nb[3] = bytes;
            ggml_backend_tensor_set(&whole, data, 0, bytes);
            data = static_cast<char*>(sources_[j].data);
        }
        sources_[j].data = data + (src->view_offs - first * row_bytes);
        node_.src[j] = &sources_[j];
    }
    return {};
}

}  // namespace turboquant::ggml
