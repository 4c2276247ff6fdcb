// What the verbs of stores on a GPU need one after the other: a stream, memory that is used again by the next verb, and what of a step is
// the same for all layers (StoreContext::device).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <span>
#include <vector>

#include "turboquant/cache/cuda/device_tables.h"
#include "turboquant/cache/tile_store.h"
#include "turboquant/cuda/step.h"

namespace turboquant {

class Queue {
  public:
    /// Throws std::runtime_error.
    explicit Queue(int device);
    ~Queue();
    Queue(const Queue&) = delete;
    /// That of a context, made if it has none; the device is the calling thread's from now on.
    static Queue& of(StoreContext& ctx, int device);
    /// Waits for the work of all queues of a device. Not for the device: another thread may be capturing a graph there, which must not be
    /// waited for.
    static void synchronize_all(int device);
    /// f(queue), on one that all share whose verbs have no context: after all work before, and done when this returns.
    template <class F>
    static void apart(int device, F&& f) {
        const std::scoped_lock lock(shared_mutex());
        Queue& queue = shared(device);
        synchronize_all(device);
        must(cuda::use_device(device));
        f(queue);
        must(cuda::synchronize(queue.stream()));
    }

    cuda::Stream stream() const { return stream_; }
    DeviceTables& tables() const { return *tables_; }

    /// Memory of a purpose, until it is asked for again.
    enum class Use {
        rows,
        places,
        slots,
        rounded,
        ids,
        positions,
        turns,
        shifts,
        form,
        queries,
        terms,
        offsets,
        lse,
        other_lse,
        other,
        from,
        to,
        term_ids,
        count
    };
    template <class T>
    T* memory(Use use, std::size_t n) {
        cuda::DeviceArray& a = arrays_[static_cast<std::size_t>(use)];
        if (n * sizeof(T) > a.bytes()) settle();
        must(a.reserve(n * sizeof(T), stream_));
        return a.as<T>();
    }
    /// Data on the device; what is there already is not copied again.
    template <class T>
    const T* upload(Use use, std::span<const T> data) {
        Sent& sent = sent_[static_cast<std::size_t>(use)];
        T* to = memory<T>(use, std::max<std::size_t>(data.size(), 1));
        if (sent.valid && sent.bytes.size() == data.size_bytes() && std::memcmp(sent.bytes.data(), data.data(), data.size_bytes()) == 0)
            return to;
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(data.data());
        settle();
        sent.bytes.assign(bytes, bytes + data.size_bytes());
        sent.valid = true, sent.number++;
        must(cuda::to_device(to, sent.bytes.data(), sent.bytes.size(), stream_));
        return to;
    }
    /// A second stream, for work that nothing waits for before the graph's end: it begins after all given to the first so far.
    cuda::Stream fork();
    /// The first stream goes on after the second. Called by all that touches what the second may be working on.
    void settle();

    /// Changes with every copy.
    std::uint64_t number(Use use) const { return sent_[static_cast<std::size_t>(use)].number; }
    /// Cosines and sines at the positions last uploaded (Use::positions).
    const float* turns_of_positions(const RopeTable& rope, int head_dim, int n);

    struct PlannedAttention {
        cuda::AttentionPlan plan;
        cuda::DeviceArray workspace;
        std::vector<int> key{};
        std::uint64_t used = 0;
    };
    PlannedAttention& plan(const cuda::AttentionShape& shape);

    /// What comes with the mask of a call, on the device.
    struct Step {
        std::uint64_t number = 0;
        const std::uint16_t* mask = nullptr;  ///< as the call's, or with exact cells hidden
        std::size_t mask_stride = 0;
        int n_slots = 0;  ///< of exact rows
        std::size_t exact_stride = 0;
        int max_position = 0;
        cuda::DeviceArray patched, tile, halves, exact_mask, exact_n, cell_pos, cell_term, tile_pos;
    };
    /// That of a number (TileStore::attend), filled in by `make` if it is another one than was there, or 0.
    template <class F>
    Step& step(std::uint64_t number, F&& make) {
        const std::size_t at = number & 0xffff;
        while (steps_.size() <= at) steps_.emplace_back();
        Step& s = steps_[at];
        if (number == 0 || s.number != number) make(s), s.number = number;
        return s;
    }

    /// Slots of the rows that the second stream encodes, of a batch's keys or its values; false if those of the other side differ.
    bool same_slots(std::span<const std::int32_t> slots);

    std::uint32_t* not_finite() const { return not_finite_.as<std::uint32_t>(); }
    /// Whether a vector that was written since the last call was not finite. The stream is waited for.
    bool take_not_finite();

  private:
    static std::mutex& shared_mutex();
    static Queue& shared(int device);
    struct Sent {
        std::vector<std::uint8_t> bytes;
        bool valid = false;
        std::uint64_t number = 0;
    };
    static constexpr std::size_t kUses = static_cast<std::size_t>(Use::count);
    static constexpr std::size_t kPlans = 6;

    int device_;
    DeviceTables* tables_;
    cuda::Stream stream_ = nullptr, side_ = nullptr;
    void *forked_ = nullptr, *side_done_ = nullptr;
    bool side_busy_ = false;
    std::array<cuda::DeviceArray, kUses> arrays_;
    std::array<Sent, kUses> sent_;
    cuda::DeviceArray not_finite_;
    std::deque<PlannedAttention> plans_;
    std::uint64_t clock_ = 0;
    std::deque<Step> steps_;
    std::vector<std::int32_t> side_slots_;
    struct TurnsKey {
        const float* digits = nullptr;
        int head_dim = 0, n_dims = 0, n_offset = 0, n = 0;
        bool adjacent = false;
        std::uint64_t positions = 0;
        friend bool operator==(const TurnsKey&, const TurnsKey&) = default;
    } turns_;
};

inline cuda::RopeLayout rope_layout(const RopeTable& rope) { return {rope.n_dims, rope.n_offset, rope.pairs == RopePairs::adjacent}; }

}  // namespace turboquant
