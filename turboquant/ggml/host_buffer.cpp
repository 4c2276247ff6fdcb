#include "turboquant/ggml/host_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

namespace turboquant::ggml {

HostBuffer::HostBuffer(std::size_t size) : size_(std::max<std::size_t>(size, 1)) {
    void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::uint8_t*>(p);
}

HostBuffer::~HostBuffer() { munmap(base_, size_); }

void HostBuffer::get(const ggml_tensor* t, void* data, std::size_t offset, std::size_t size) const {
    std::memcpy(data, static_cast<const char*>(t->data) + offset, size);
}
void HostBuffer::set(ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) {
    std::memcpy(static_cast<char*>(t->data) + offset, data, size);
}
void HostBuffer::fill(ggml_tensor* t, std::uint8_t value, std::size_t offset, std::size_t size) {
    std::memset(static_cast<char*>(t->data) + offset, value, size);
}
bool HostBuffer::copy(const InnerMemory&, const ggml_tensor* src, ggml_tensor* dst) {
    std::memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

// Drops the pages, so an emptied cache gives its memory back; they read as zero.
void HostBuffer::clear() {
    if (madvise(base_, size_, MADV_DONTNEED) != 0) std::memset(base_, 0, size_);
}
void HostBuffer::fill_all(std::uint8_t value) { value ? static_cast<void>(std::memset(base_, value, size_)) : clear(); }

std::size_t HostBuffer::touched(const void* first, std::size_t size) const {
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(first) / page * page;
    const auto end = (reinterpret_cast<std::uintptr_t>(first) + size + page - 1) / page * page;
    std::vector<unsigned char> resident((end - begin) / page);
    if (mincore(reinterpret_cast<void*>(begin), end - begin, resident.data()) != 0) return 0;
    return static_cast<std::size_t>(std::ranges::count_if(resident, [](unsigned char r) { return r & 1; })) * page;
}

}  // namespace turboquant::ggml
