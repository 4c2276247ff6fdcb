// What the streams of the host's kernels know of each other. All work is done at once and in order there, so that a wait which is missing
// would not show: these clocks say whether a stream has waited for what another wrote.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>

namespace turboquant::cuda::test {

class HostStream;
/// Of each stream, how much of its work is known to be done.
using Known = std::map<const HostStream*, std::uint64_t>;

struct HostEvent {
    Known known;
};

class HostStream {
  public:
    ~HostStream() {
        const std::scoped_lock lock(mutex());
        std::erase_if(written(), [this](const auto& w) { return w.second.by == this; });
    }
    void record(HostEvent& event) const {
        const std::scoped_lock lock(mutex());
        event.known = known_, event.known[this] = work_;
    }
    void wait_for(const HostEvent& event) {
        const std::scoped_lock lock(mutex());
        for (const auto& [stream, work] : event.known) known_[stream] = std::max(known_[stream], work);
    }
    /// Writes what attention finds at `tiles`.
    void writes(const void* tiles) {
        const std::scoped_lock lock(mutex());
        written()[tiles] = {this, ++work_};
    }
    /// Whether what was last written there is done when this stream goes on, after an event or null.
    bool may_read(const void* tiles, const HostEvent* event) const {
        const std::scoped_lock lock(mutex());
        const auto found = written().find(tiles);
        if (found == written().end() || found->second.by == this) return true;
        const auto [by, work] = found->second;
        const auto knows = [&](const Known& known) { return known.contains(by) && known.at(by) >= work; };
        return knows(known_) || (event && knows(event->known));
    }
    /// The host has waited for it: all streams know.
    void done() {
        const std::scoped_lock lock(mutex());
        std::erase_if(written(), [this](const auto& w) {
            return w.second.by == this || (known_.contains(w.second.by) && known_.at(w.second.by) >= w.second.work);
        });
    }

  private:
    struct Written {
        const HostStream* by;
        std::uint64_t work;
    };
    static std::mutex& mutex() {
        static auto* m = new std::mutex;  // streams are dropped after static destructors began
        return *m;
    }
    static std::map<const void*, Written>& written() {
        static auto* w = new std::map<const void*, Written>;
        return *w;
    }

    std::uint64_t work_ = 0;
    Known known_;
};

}  // namespace turboquant::cuda::test
