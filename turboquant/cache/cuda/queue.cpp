#include "turboquant/cache/cuda/queue.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace turboquant {

namespace {

struct Live {
    std::mutex mutex;
    std::vector<std::pair<int, cuda::Stream>> streams;
};
Live& live() {
    static auto* all = new Live;  // never destroyed: programs free their contexts after static destructors began
    return *all;
}

}  // namespace

std::mutex& Queue::shared_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

Queue& Queue::shared(int device) {
    static auto* queues = new std::map<int, std::unique_ptr<Queue>>;
    auto& queue = (*queues)[device];
    if (!queue) queue = std::make_unique<Queue>(device);
    return *queue;
}

void Queue::synchronize_all(int device) {
    const std::scoped_lock lock(live().mutex);
    for (const auto& [at, stream] : live().streams)
        if (at == device) must(cuda::synchronize(stream));
}

Queue::Queue(int device) : device_(device), tables_(&DeviceTables::of(device)) {
    must(cuda::use_device(device));
    must(cuda::new_stream(stream_));
    must(cuda::new_stream(side_));
    must(cuda::new_event(forked_));
    must(cuda::new_event(side_done_));
    must(not_finite_.reserve(sizeof(std::uint32_t), stream_));
    must(cuda::clear_tiles(not_finite_.as<void>(), sizeof(std::uint32_t), stream_));
    const std::scoped_lock lock(live().mutex);
    live().streams.emplace_back(device, stream_);
    live().streams.emplace_back(device, side_);
}

Queue::~Queue() {
    {
        const std::scoped_lock lock(live().mutex);
        std::erase_if(live().streams, [&](const auto& s) { return s.second == stream_ || s.second == side_; });
    }
    (void)cuda::use_device(device_);
    if (stream_) (void)cuda::synchronize(stream_);
    if (side_) (void)cuda::synchronize(side_);
    cuda::drop_event(forked_), cuda::drop_event(side_done_);
    cuda::drop_stream(side_), cuda::drop_stream(stream_);
}

cuda::Stream Queue::fork() {
    must(cuda::record(forked_, stream_));
    must(cuda::wait_for(side_, forked_));
    side_busy_ = true;
    return side_;
}

void Queue::settle() {
    if (!std::exchange(side_busy_, false)) return;
    side_slots_.clear();
    must(cuda::record(side_done_, side_));
    must(cuda::wait_for(stream_, side_done_));
}

bool Queue::same_slots(std::span<const std::int32_t> slots) {
    if (side_slots_.empty()) side_slots_.assign(slots.begin(), slots.end());
    return std::ranges::equal(side_slots_, slots);
}

Queue& Queue::of(StoreContext& ctx, int device) {
    if (!ctx.device) ctx.device = std::make_shared<Queue>(device);
    must(cuda::use_device(device));
    return *static_cast<Queue*>(ctx.device.get());
}

const float* Queue::turns_of_positions(const RopeTable& rope, int head_dim, int n) {
    const float* digits = tables_->turns(rope.frequencies);
    const cuda::RopeLayout layout = rope_layout(rope);
    const TurnsKey key{digits, head_dim, layout.n_dims, layout.n_offset, n, layout.adjacent, number(Use::positions)};
    float* to = memory<float>(Use::turns, static_cast<std::size_t>(n) * 2 * head_dim);
    if (key == turns_) return to;
    settle();
    must(cuda::spread_turns(digits, rope.n_freq, layout, head_dim, memory<std::int32_t>(Use::positions, n), n, to, stream_));
    turns_ = key;
    return to;
}

Queue::PlannedAttention& Queue::plan(const cuda::AttentionShape& s) {
    std::vector<int> key{s.head_dim, s.n_head, s.n_head_kv, s.n_tokens, s.n_kv[0], s.exact_windows, s.term};
    for (const CodecId codec : s.formats) key.push_back(static_cast<int>(codec));
    for (PlannedAttention& p : plans_)
        if (p.key == key) {
            p.used = ++clock_;
            return p;
        }
    if (plans_.size() == kPlans) {
        must(cuda::synchronize(stream_));
        plans_.erase(std::ranges::min_element(plans_, {}, &PlannedAttention::used));
    }
    PlannedAttention& p = plans_.emplace_back();
    try {
        must(cuda::plan_attention(tables_->device(), s, p.plan));
        must(p.workspace.reserve(p.plan.workspace_bytes, stream_));
        must(cuda::prepare_workspace(p.plan, p.workspace.as<void>(), stream_));
    } catch (...) {
        plans_.pop_back();
        throw;
    }
    p.key = std::move(key), p.used = ++clock_;
    return p;
}

bool Queue::take_not_finite() {
    std::uint32_t found = 0;
    must(cuda::to_host(&found, not_finite_.as<void>(), sizeof found, stream_));
    if (found) must(cuda::clear_tiles(not_finite_.as<void>(), sizeof found, stream_));
    return found != 0;
}

}  // namespace turboquant
