// Memory of buffers in the host's: address space, of which pages that nothing was written to cost nothing.
#pragma once

#include "turboquant/ggml/inner_device.h"

namespace turboquant::ggml {

class HostBuffer final : public InnerMemory {
  public:
    explicit HostBuffer(std::size_t size);  ///< throws std::bad_alloc
    ~HostBuffer() override;

    void* base() const override { return base_; }
    void get(const ggml_tensor* t, void* data, std::size_t offset, std::size_t size) const override;
    void set(ggml_tensor* t, const void* data, std::size_t offset, std::size_t size) override;
    void fill(ggml_tensor* t, std::uint8_t value, std::size_t offset, std::size_t size) override;
    bool copy(const InnerMemory& from, const ggml_tensor* src, ggml_tensor* dst) override;
    void clear() override;
    void fill_all(std::uint8_t value) override;
    std::size_t touched(const void* first, std::size_t size) const override;

  private:
    std::uint8_t* base_ = nullptr;
    std::size_t size_;
};

}  // namespace turboquant::ggml
