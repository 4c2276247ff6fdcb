#include "turboquant/cuda/memory.h"

namespace turboquant::cuda {

Status DeviceArray::reserve(std::size_t bytes, Stream stream) {
    if (bytes <= bytes_) return {};
    if (memory_) {
        if (Status s = synchronize(stream); !s.ok()) return s;
        release(memory_);
        memory_ = nullptr, bytes_ = 0;
    }
    bytes = (bytes + 255) / 256 * 256;
    if (Status s = allocate(bytes, memory_); !s.ok()) return s;
    bytes_ = bytes;
    return {};
}

}  // namespace turboquant::cuda
