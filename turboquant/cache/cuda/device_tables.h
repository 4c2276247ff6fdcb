// Constants of one GPU that all stores on it share: made when first asked for, kept for the life of the process.
#pragma once

#include <map>
#include <mutex>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "turboquant/cuda/attention.h"
#include "turboquant/cuda/memory.h"

namespace turboquant {

/// Throws std::runtime_error with the cause if it is none.
void must(const cuda::Status& status);

/// A copy of n values in `to`, in the stream's order. Throws as must().
template <class T>
T* put(cuda::DeviceArray& to, const T* data, std::size_t n, cuda::Stream stream) {
    must(to.reserve(n * sizeof(T), stream));
    must(cuda::to_device(to.as<void>(), data, n * sizeof(T), stream));
    return to.as<T>();
}
/// The same for what is there once and for all: done when this returns, for every stream.
template <class T>
T* put(cuda::DeviceArray& to, const std::vector<T>& data) {
    put(to, data.data(), data.size(), nullptr);
    must(cuda::synchronize(nullptr));
    return to.as<T>();
}

class DeviceTables {
  public:
    /// Throws std::runtime_error if the device cannot be asked.
    static DeviceTables& of(int device);

    const cuda::Device& device() const { return device_; }
    /// Rotation of a head size (cuda/step.h, KeepRows).
    struct Rotation {
        const float *matrix = nullptr, *signs = nullptr;
    };
    Rotation rotation(int head_dim);
    const cuda::AttentionTables& attention(int head_dim);
    /// The table of rotations (attention/turns.h) of these frequencies.
    const float* turns(std::span<const double> frequencies);
    struct Term {
        const float* turns = nullptr;  ///< cuda/attention.h, make_term_turns, and make_term_panel
        const void* panel = nullptr;
        int max_position = -1;
    };
    /// Good for positions up to max_position; while there are fewer than `n_expected`, for all of these, since a table takes the host
    /// some milliseconds and would be made between two steps.
    Term term(std::span<const double> frequencies, int max_position, int n_expected);

  private:
    explicit DeviceTables(int index);
    template <class T>
    T* keep(const std::vector<T>& data) {
        return put(memory_.emplace_back(), data);
    }

    cuda::Device device_;
    std::mutex mutex_;
    std::vector<cuda::DeviceArray> memory_;
    std::map<int, Rotation> rotations_;
    std::map<int, cuda::AttentionTables> attention_;
    std::map<std::vector<double>, const float*> turns_;
    std::map<std::vector<double>, Term> terms_;
};

}  // namespace turboquant
