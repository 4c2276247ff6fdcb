#include "turboquant/cuda/memory.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace turboquant::cuda {
namespace {

cudaStream_t of(Stream s) { return static_cast<cudaStream_t>(s); }

}  // namespace

Status use_device(int index) { return status_of(cudaSetDevice(index), "cudaSetDevice"); }

Status new_stream(Stream& stream, bool urgent) {
    cudaStream_t s = nullptr;
    int last = 0, first = 0;
    if (const int error = cudaDeviceGetStreamPriorityRange(&last, &first)) return status_of(error, "cudaDeviceGetStreamPriorityRange");
    const int error = cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, urgent ? first : last);
    stream = s;
    return status_of(error, "cudaStreamCreate");
}
void drop_stream(Stream stream) {
    if (stream) cudaStreamDestroy(of(stream));
}
Status synchronize(Stream stream) { return status_of(cudaStreamSynchronize(of(stream)), "cudaStreamSynchronize"); }
Status wait_for(Stream stream, void* event) {
    return status_of(cudaStreamWaitEvent(of(stream), static_cast<cudaEvent_t>(event), 0), "cudaStreamWaitEvent");
}
Status record(void* event, Stream stream) {
    return status_of(cudaEventRecord(static_cast<cudaEvent_t>(event), of(stream)), "cudaEventRecord");
}

Status new_event(void*& event) {
    cudaEvent_t e = nullptr;
    const int error = cudaEventCreateWithFlags(&e, cudaEventDisableTiming);
    event = e;
    return status_of(error, "cudaEventCreate");
}
void drop_event(void* event) {
    if (event) cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

Status allocate(std::size_t bytes, void*& memory) {
    memory = nullptr;
    return status_of(cudaMalloc(&memory, bytes), "cudaMalloc");
}
void release(void* memory) {
    if (memory) cudaFree(memory);
}

Status allocate_shared(std::size_t bytes, void*& memory) {
    memory = nullptr;
    const int error = cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
    if (!error) std::memset(memory, 0, bytes);
    return status_of(error, "cudaHostAlloc");
}
void release_shared(void* memory) {
    if (memory) cudaFreeHost(memory);
}
bool driver_alive() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && cudaFree(nullptr) == cudaSuccess;
}

Status begin_capture(Stream origin) {
    return status_of(cudaStreamBeginCapture(of(origin), cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture");
}
Status end_capture(Stream origin, void*& graph) {
    graph = nullptr;
    cudaGraph_t captured = nullptr;
    if (const int error = cudaStreamEndCapture(of(origin), &captured)) return status_of(error, "cudaStreamEndCapture");
    cudaGraphExec_t exec = nullptr;
    const int error = cudaGraphInstantiateWithFlags(&exec, captured, 0);
    cudaGraphDestroy(captured);
    graph = exec;
    return status_of(error, "cudaGraphInstantiate");
}
Status launch_graph(void* graph, Stream stream) {
    return status_of(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), of(stream)), "cudaGraphLaunch");
}
void drop_graph(void* graph) {
    if (graph) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

Status to_device(void* device, const void* host, std::size_t bytes, Stream stream) {
    return status_of(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, of(stream)), "copy to the device");
}
Status to_host(void* host, const void* device, std::size_t bytes, Stream stream) {
    if (const int error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, of(stream)))
        return status_of(error, "copy from the device");
    return synchronize(stream);
}

}  // namespace turboquant::cuda
