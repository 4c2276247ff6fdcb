// The device of the host's kernels (host_kernels.cpp): streams and events that keep account (host_streams.h), memory of the host.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "tests/cuda/host_streams.h"
#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/memory.h"
#include "turboquant/cuda/pieces.h"

namespace turboquant::cuda {

std::string Status::message() const { return where ? where : ""; }
Status status_of(int error, const char* where) { return error ? Status{error, where} : Status{}; }
Status count_devices(int& n) { return n = 1, Status{}; }
Status query_device(int index, Device& device) { return device = {index, "host", 90, 1, 1 << 20, 1 << 30, 1 << 20}, Status{}; }
Status use_device(int) { return {}; }
Status new_stream(Stream& stream, bool) { return stream = new test::HostStream, Status{}; }
void drop_stream(Stream stream) { delete static_cast<test::HostStream*>(stream); }
Status synchronize(Stream stream) {
    if (stream) static_cast<test::HostStream*>(stream)->done();
    return {};
}
Status wait_for(Stream stream, void* event) {
    return static_cast<test::HostStream*>(stream)->wait_for(*static_cast<test::HostEvent*>(event)), Status{};
}
Status record(void* event, Stream stream) {
    return static_cast<test::HostStream*>(stream)->record(*static_cast<test::HostEvent*>(event)), Status{};
}
Status new_event(void*& event) { return event = new test::HostEvent, Status{}; }
void drop_event(void* event) { delete static_cast<test::HostEvent*>(event); }
Status allocate(std::size_t bytes, void*& memory) {
    memory = std::aligned_alloc(256, bytes);
    std::memset(memory, 0xff, bytes);  // what was never written is no number
    return {};
}
void release(void* memory) { std::free(memory); }
Status allocate_shared(std::size_t bytes, void*& memory) { return memory = std::calloc(1, bytes), Status{}; }
void release_shared(void* memory) { std::free(memory); }
bool driver_alive() { return true; }
Status begin_capture(Stream) { return bad_argument("host kernels: nothing is captured"); }
Status end_capture(Stream, void*& graph) { return graph = nullptr, bad_argument("host kernels: nothing is captured"); }
Status launch_graph(void*, Stream) { return bad_argument("host kernels: no graphs"); }
void drop_graph(void*) {}
Status to_device(void* device, const void* host, std::size_t bytes, Stream) {
    if (bytes) std::memcpy(device, host, bytes);
    return {};
}
Status send(const Pieces& p, Stream) {
    for (int i = 0, begin = 0; i < p.n; begin = p.end[i++]) std::copy(p.words + begin, p.words + p.end[i], p.to[i]);
    return {};
}
Status to_host(void* host, const void* device, std::size_t bytes, Stream) { return std::memcpy(host, device, bytes), Status{}; }

}  // namespace turboquant::cuda
