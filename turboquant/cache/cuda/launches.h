// Work for a GPU as a list: launches with their arguments by value. It can be done later, and compared with another step's: what is the
// same, byte by byte, does the same to the same memory, so that a graph captured from one list serves for the other.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "turboquant/cuda/memory.h"

namespace turboquant {

/// The streams that a list is done on: the other is for work beside the main one, which forks and joins it by events.
struct Lanes {
    cuda::Stream main = nullptr, side = nullptr;
};

class Launches {
  public:
    /// Whether lists that are the same are always seen to be. Where a compiler cannot clear padding they may not be, and are done one by one, slower.
#if __has_builtin(__builtin_clear_padding)
    static constexpr bool kComparable = true;
#else
    static constexpr bool kComparable = false;
#endif

    /// f(lanes) launches something and returns a Status. What it holds is compared by bytes: pointers to memory of the device, numbers.
    template <class F>
    void add(const F& f) {
        static_assert(std::is_trivially_copyable_v<F> && alignof(F) <= alignof(Unit));
        entries_.push_back({[](const void* held, const Lanes& lanes) { return (*static_cast<const F*>(held))(lanes); }, held_.size()});
        held_.resize(held_.size() + (sizeof(F) + sizeof(Unit) - 1) / sizeof(Unit));
        void* to = held_.data() + entries_.back().at;
        std::memcpy(to, &f, sizeof(F));
        clear_padding(static_cast<F*>(to));
    }
    void drop_last() {
        held_.resize(entries_.back().at);
        entries_.pop_back();
    }
    std::size_t size() const { return entries_.size(); }
    void clear() { entries_.clear(), held_.clear(); }

    /// Does those from `first` to `end` - 1 in order, up to the first that fails.
    cuda::Status run(std::size_t first, std::size_t end, const Lanes& lanes) const {
        for (std::size_t i = first; i < end; i++)
            if (cuda::Status s = entries_[i].run(held_.data() + entries_[i].at, lanes); !s.ok()) return s;
        return {};
    }
    friend bool operator==(const Launches& a, const Launches& b) {
        return a.entries_ == b.entries_ && a.held_.size() == b.held_.size() &&
               (a.held_.empty() || std::memcmp(a.held_.data(), b.held_.data(), a.held_.size() * sizeof(Unit)) == 0);
    }

  private:
    struct alignas(16) Unit {
        unsigned char bytes[16];
    };
    struct Entry {
        cuda::Status (*run)(const void*, const Lanes&);
        std::size_t at;
        friend bool operator==(const Entry&, const Entry&) = default;
    };
    template <class F>
    static void clear_padding([[maybe_unused]] F* f) {
#if __has_builtin(__builtin_clear_padding)
        __builtin_clear_padding(f);
#endif
    }

    std::vector<Entry> entries_;
    std::vector<Unit> held_;
};

}  // namespace turboquant
