#include "turboquant/ggml/input_copies.h"

#include <cstring>

namespace turboquant::ggml {
namespace {

constexpr std::int64_t kMostCopiedTokens = 64;
bool is_copied(const ggml_tensor* t) { return t->type != GGML_TYPE_F16 || t->ne[1] <= kMostCopiedTokens; }

}  // namespace

/// Integers and masks that no operation computes. Weights have other types or are not set more than once; a copy of those few costs memory
/// only.
bool InputCopies::keeps(const ggml_tensor* t) {
    return !t->view_src &&
           (t->type == GGML_TYPE_I32 || t->type == GGML_TYPE_I64 || (t->type == GGML_TYPE_F16 && t->flags & GGML_TENSOR_FLAG_INPUT) ||
            (t->type == GGML_TYPE_F16 && std::strstr(t->name, "mask")));
}

void InputCopies::set(const ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) {
    if (!keeps(t)) return;
    Copy& copy = copies_[t->data];
    const bool whole = offset == 0 && size == ggml_nbytes(t);
    if (copy.tensor != t && !whole) return forget(t);
    copy.tensor = t;
    if (!is_copied(t)) return whole ? copy.bytes.clear() : forget(t);
    if (whole) copy.bytes.resize(size);
    if (copy.bytes.size() < offset + size) return forget(t);
    std::memcpy(copy.bytes.data() + offset, data, size);
}

const void* InputCopies::find(const ggml_tensor* t) const {
    const auto found = copies_.find(t->data);
    return found != copies_.end() && found->second.tensor == t && found->second.bytes.size() == ggml_nbytes(t) ? found->second.bytes.data()
                                                                                                               : nullptr;
}

bool InputCopies::is_there(const ggml_tensor* t) const {
    const auto found = copies_.find(t->data);
    return found != copies_.end() && found->second.tensor == t && found->second.bytes.empty();
}

}  // namespace turboquant::ggml
