// Errors of the CUDA layer as values, and what is known of a device. Free of CUDA's own headers.
#pragma once

#include <cstddef>
#include <string>

namespace turboquant::cuda {

/// A stream or a piece of device memory's owner is CUDA's own handle: cudaStream_t.
using Stream = void*;

/// Success, or what failed and why: `cuda` is a cudaError_t (0: the arguments are at fault), `where` the call or the argument, static text.
struct [[nodiscard]] Status {
    int cuda = 0;
    const char* where = nullptr;

    bool ok() const { return where == nullptr; }
    /// "" if ok, else "where: CUDA's text (its name)".
    std::string message() const;
};

/// Wraps a cudaError_t; ok if it is cudaSuccess. An error is no longer the thread's last one then (cudaGetLastError).
Status status_of(int cuda_error, const char* where);
/// Arguments that cannot be served; `what` is static text and says what would be.
inline Status bad_argument(const char* what) { return {0, what}; }

struct Device {
    int index = 0;
    std::string name;
    int compute_capability = 0;  ///< 10*major + minor
    int n_sm = 0;
    std::size_t l2_bytes = 0, memory_bytes = 0, shared_per_block = 0;  ///< the last: opt-in maximum
};

/// Number of devices; an error where there is no driver or no device, or the driver is too old.
Status count_devices(int& n);
Status query_device(int index, Device& device);

}  // namespace turboquant::cuda
