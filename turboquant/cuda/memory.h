// Memory of a device and the order of work on it, for those above who do not know CUDA's own headers.
#pragma once

#include <cstddef>
#include <utility>

#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

/// What the calling thread works on from now on.
Status use_device(int index);

/// `urgent`: its work goes before that of other streams where places become free.
Status new_stream(Stream& stream, bool urgent = false);
void drop_stream(Stream stream);
Status synchronize(Stream stream);
/// Work given to the stream from now on waits for what the event (cudaEvent_t) was recorded after; and records one.
Status wait_for(Stream stream, void* event);
Status record(void* event, Stream stream);

/// An event of our own, for these.
Status new_event(void*& event);
void drop_event(void* event);

Status allocate(std::size_t bytes, void*& memory);
void release(void* memory);
/// In the stream's order. `host` may be changed as soon as this returns.
Status to_device(void* device, const void* host, std::size_t bytes, Stream stream);
/// The stream is waited for.
Status to_host(void* host, const void* device, std::size_t bytes, Stream stream);

/// Memory of the host that kernels may write, zeroed; small. And back.
Status allocate_shared(std::size_t bytes, void*& memory);
void release_shared(void* memory);
/// False: the driver is shutting down (static destructors of a program run), and whatever was allocated is gone with it.
bool driver_alive();

/// Work given to `origin` from now on, and to streams that wait for its events, is recorded as a graph instead of done. Other threads go on
/// as before.
Status begin_capture(Stream origin);
/// The end of it: a graph that can be launched, to be dropped by its owner. Nothing is recorded any more, whatever is returned.
Status end_capture(Stream origin, void*& graph);
Status launch_graph(void* graph, Stream stream);
void drop_graph(void* graph);

/// Device memory that grows, contents lost. Never while work that uses it is under way: the stream is waited for.
class DeviceArray {
  public:
    DeviceArray() = default;
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    DeviceArray(DeviceArray&& other) noexcept { swap(other); }
    DeviceArray& operator=(DeviceArray&& other) noexcept {
        swap(other);
        return *this;
    }
    ~DeviceArray() { release(memory_); }

    /// At least so many bytes, 256-byte aligned.
    Status reserve(std::size_t bytes, Stream stream);
    std::size_t bytes() const { return bytes_; }
    template <class T>
    T* as() const {
        return static_cast<T*>(memory_);
    }

    void swap(DeviceArray& other) noexcept { std::swap(memory_, other.memory_), std::swap(bytes_, other.bytes_); }

  private:
    void* memory_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace turboquant::cuda
