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
        for (auto& [at, by] : read()) by.erase(this);
    }
    void record(HostEvent& event) const {
        const std::scoped_lock lock(mutex());
        event.known = known_, event.known[this] = work_;
    }
    /// The host has waited for it: all streams know.
    static void done(const HostEvent& event) {
        const std::scoped_lock lock(mutex());
        forget(event.known);
    }
    void wait_for(const HostEvent& event) {
        const std::scoped_lock lock(mutex());
        for (const auto& [stream, work] : event.known) known_[stream] = std::max(known_[stream], work);
    }
    /// Writes what others find at this address: tiles, or the data of a tensor.
    void writes(const void* at) {
        const std::scoped_lock lock(mutex());
        written()[at] = {this, ++work_};
    }
    void reads(const void* at) {
        const std::scoped_lock lock(mutex());
        read()[at][this] = ++work_;
    }
    /// Whether work was given to it that others want: who waits for it may wait long.
    bool has_work() const { return work_ > 0; }
    /// The host does, and waits for that.
    static void host_writes(const void* at) {
        const std::scoped_lock lock(mutex());
        written().erase(at);
    }
    /// Memory was freed: what comes to lie there is another's.
    static void freed(const void* at, std::size_t bytes) {
        const std::scoped_lock lock(mutex());
        const auto within = [at, end = static_cast<const char*>(at) + bytes](const auto& w) { return w.first >= at && w.first < end; };
        std::erase_if(written(), within), std::erase_if(read(), within);
    }
    static bool host_may_read(const void* at) {
        const std::scoped_lock lock(mutex());
        return !written().contains(at);
    }
    /// Whether all who read there, as far as they said so, are through when this stream goes on.
    bool may_write(const void* at) const {
        const std::scoped_lock lock(mutex());
        return std::ranges::all_of(read()[at], [this](const auto& r) { return r.first == this || knows(known_, r.first, r.second); });
    }
    /// Whether what was last written there is done when this stream goes on, after an event or null.
    bool may_read(const void* at, const HostEvent* event = nullptr) const {
        const std::scoped_lock lock(mutex());
        const auto found = written().find(at);
        if (found == written().end() || found->second.by == this) return true;
        const auto [by, work] = found->second;
        return knows(known_, by, work) || (event && knows(event->known, by, work));
    }
    /// The host has waited for it: all streams know.
    void done() {
        const std::scoped_lock lock(mutex());
        Known all = known_;
        all[this] = work_;
        forget(all);
    }

  private:
    struct Written {
        const HostStream* by;
        std::uint64_t work;
    };
    static bool knows(const Known& known, const HostStream* by, std::uint64_t work) {
        const auto found = known.find(by);
        return found != known.end() && found->second >= work;
    }
    static void forget(const Known& done) {
        std::erase_if(written(), [&](const auto& w) { return knows(done, w.second.by, w.second.work); });
        for (auto& [at, by] : read()) std::erase_if(by, [&](const auto& r) { return knows(done, r.first, r.second); });
    }
    static std::mutex& mutex() {
        static auto* m = new std::mutex;  // streams are dropped after static destructors began
        return *m;
    }
    static std::map<const void*, Written>& written() {
        static auto* w = new std::map<const void*, Written>;
        return *w;
    }
    static std::map<const void*, Known>& read() {
        static auto* r = new std::map<const void*, Known>;
        return *r;
    }

    std::uint64_t work_ = 0;
    Known known_;
};

}  // namespace turboquant::cuda::test
