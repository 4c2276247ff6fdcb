// The kernels timed on this machine's GPU: CUDA-graph replays, medians, inputs that take turns and together are larger than the L2 cache.
// Codes and values are random; what is computed is not looked at (tests do that).
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "turboquant/codec/codec.h"
#include "turboquant/cuda/status.h"

namespace turboquant::cuda {

struct AttentionCase {
    CodecId k = CodecId::turbo4, v = CodecId::turbo4;
    int batch = 1, n_kv = 4096;  ///< sequences, and cells of each
    int head_dim = 128, n_head = 32, n_head_kv = 8;
    int n_tokens = 1;        ///< query tokens of each sequence
    bool causal = true;      ///< several query tokens: each sees the cells up to its own
    bool term = false;       ///< with the key offset's score term, head_dim/2 frequencies
    int exact = 0;           ///< rows of each sequence kept exactly beside
    bool by_decode = false;  ///< the decode kernels take the call, also where a plan would have prefill for it
    /// As in a model: other data passes through the second-level cache and other code through the multiprocessors before each call. `rehearsed`:
    /// and after that the same call on another workspace, as GpuBackend rehearses. The call's own time.
    bool cold = false, rehearsed = false;
};

struct EncodeCase {
    CodecId codec = CodecId::turbo4;
    Side side = Side::key;
    int head_dim = 128, n_head = 8;
    int n_tokens = 16384;  ///< of a call, into cells 0, 1, ..
    bool half = false;     ///< fp16 input, else fp32
    bool offset = false;   ///< the key offset is taken out
};

struct Timing {
    double us = 0;
    double bytes = 0;  ///< read and, in encoding, written
    int parts = 0;     ///< that attention cut a sequence into
};

class KernelTimer {
  public:
    /// Throws std::runtime_error where there is no such device or its memory cannot be had, with CUDA's cause.
    explicit KernelTimer(int device = 0);
    ~KernelTimer();
    const Device& device() const;
    /// Bytes per second: of reading alone, and of copying (read plus written).
    double read_bandwidth();
    double copy_bandwidth();
    /// Throw std::runtime_error on shapes that have no kernel or do not fit in memory.
    Timing attention(const AttentionCase& c);
    Timing encode(const EncodeCase& c);

  private:
    struct State;
    std::unique_ptr<State> s_;
};

}  // namespace turboquant::cuda
