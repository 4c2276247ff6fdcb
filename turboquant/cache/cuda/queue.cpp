#include "turboquant/cache/cuda/queue.h"

#include <algorithm>
#include <atomic>
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

/// The queue whose launches wait, of this thread.
thread_local Queue* t_deferring = nullptr;

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
    if (t_deferring) t_deferring->catch_up();
    const std::scoped_lock lock(live().mutex);
    for (const auto& [at, stream] : live().streams)
        if (at == device) must(cuda::synchronize(stream));
}

std::unique_lock<std::mutex> Queue::capturing() { return std::unique_lock(live().mutex); }

Queue::Queue(int device) : device_(device), tables_(&DeviceTables::of(device)) {
    must(cuda::use_device(device));
    must(cuda::new_stream(stream_));
    must(cuda::new_stream(side_));
    must(cuda::new_stream(look_, true));
    must(cuda::new_event(forked_));
    must(cuda::new_event(side_done_));
    void* shared = nullptr;
    must(cuda::allocate_shared(sizeof(std::uint32_t), shared));
    not_finite_ = static_cast<std::uint32_t*>(shared);
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
    cuda::drop_event(forked_);
    cuda::drop_event(side_done_);
    cuda::drop_stream(look_);
    cuda::drop_stream(side_);
    cuda::drop_stream(stream_);
    cuda::release_shared(not_finite_);
    cuda::release_shared(seen_);
}

void Queue::defer(std::function<void()> catch_up) {
    send_pieces();  // of a piece that ended with an exception: what is known to be on the device must be there
    keeping_ = false;
    catch_up_ = std::move(catch_up), deferring_ = true, t_deferring = this;
    waiting_.clear(), rehearsals_.clear(), early_.clear();
}

Launches& Queue::take() {
    deferring_ = false, t_deferring = nullptr;
    send_pieces();
    return waiting_;
}

void Queue::begin_graph() {
    // After a graph that failed: what waited was not done, and what waiting rows would read is this one's.
    if (in_graph_) turns_ = {};
    encodes_ = {}, batch_.reset(), side_slots_.clear();
    other_work();  // what rows that were kept were made in is no longer theirs
    graph_++, in_graph_ = true, only_kept_ = false, layers_ = 0;
    after_.clear();
    for (Uploads& u : uploads_) u.n_used = 0;
}

void Queue::end_graph(bool given) {
    in_graph_ = false;
    for (const auto& f : std::exchange(after_, {}))
        if (given) f();
}

void Queue::refresh_bytes(Copy& copy, const std::uint8_t* data, std::size_t n) {
    reserve(copy, n);
    constexpr std::size_t kBlock = 1024, kNear = 64 * kBlock;
    // What grows with a prompt's cells is sent from where it grew: the host waits for the stream where it sends much.
    const std::size_t old = copy.bytes.size();
    copy.bytes.resize(std::max(old, n));
    std::uint8_t* known = copy.bytes.data();
    const auto block = [&](std::size_t at) { return std::min(kBlock, n - at); };
    const auto same = [&](std::size_t at) { return at + block(at) <= old && std::memcmp(known + at, data + at, block(at)) == 0; };
    bool changed = old != n;
    for (std::size_t first = 0; first < n;) {
        if (same(first)) {
            first += block(first);
            continue;
        }
        std::size_t end = first + block(first);  // of the differences that lie near to each other
        for (std::size_t at = end; at < n && at < end + kNear; at += block(at))
            if (!same(at)) end = at + block(at);
        std::memcpy(known + first, data + first, end - first);
        to_device(copy.array.as<std::uint8_t>() + first, known + first, end - first);
        first = end, changed = true;
    }
    if (changed) copy.number++;
    copy.bytes.resize(n);
}

/// Before all launches that wait; small pieces wait themselves, so that one launch sends them.
void Queue::to_device(std::uint8_t* device, const std::uint8_t* host, std::size_t bytes) {
    if (deferring_ && pieces_.add(device, host, bytes)) return;
    send_pieces();
    must(cuda::to_device(device, host, bytes, stream_));
}

void Queue::send_pieces() {
    if (pieces_.n == 0) return;
    must(cuda::use_device(device_));
    must(cuda::send(pieces_, stream_));
    pieces_.n = 0;
}

Queue::Copy& Queue::uploaded(Use use, std::span<const std::uint8_t> data) {
    Uploads& u = uploads_[static_cast<std::size_t>(use)];
    const auto same = [&](const Copy& c) { return std::ranges::equal(c.bytes, data); };
    for (std::size_t i = 0; i < u.n_used; i++)
        if (same(u.copies[i])) return u.copies[i];
    while (u.copies.size() <= u.n_used) must(u.copies.emplace_back().array.reserve(256, stream_));
    Copy& copy = u.copies[u.n_used];
    if (!same(copy)) {
        // Launches that wait have data of their own; those under way are before this copy, but for the second stream's.
        if (!deferring_) settle();
        refresh_bytes(copy, data.data(), data.size());
    }
    u.n_used += deferring_;
    return copy;
}

void Queue::keep(cuda::KeepRows rows, std::span<const std::int32_t> slots) {
    const bool second = n_kept_ == 1 && std::ranges::equal(slots, kept_slots_), only_kept = only_kept_;
    if (second && keeping_ && may_join_ && deferring_) {
        waiting_.drop_last();
        launch([first = kept_[0], rows](const Lanes& lanes) { return cuda::keep_rows(first, lanes.main, &rows); });
        may_join_ = false, joined_ = true;
    } else {
        launch([rows](const Lanes& lanes) { return cuda::keep_rows(rows, lanes.main); });
        may_join_ = deferring_ && !second, joined_ = false;
    }
    keeping_ = true, only_kept_ = only_kept;
    kept_[second] = rows, n_kept_ = second ? 2 : 1;
    if (!second) kept_slots_.assign(slots.begin(), slots.end());
}

void Queue::fork() {
    launch([forked = forked_](const Lanes& lanes) {
        const cuda::Status s = cuda::record(forked, lanes.main);
        return s.ok() ? cuda::wait_for(lanes.side, forked) : s;
    });
    side_busy_ = true;
}

void Queue::encode_later(const cuda::EncodePlan& plan, const cuda::EncodeArgs& args) {
    if (encodes_.n == encodes_.of.size()) give_encodes();
    encodes_.of[encodes_.n++] = {plan, args};
}

void Queue::end_layer() {
    // At the same layers whatever was given before, so that launches come again.
    if (++layers_ % (encodes_.of.size() / 2) == 0) give_encodes();
}

void Queue::give_encodes() {
    if (encodes_.n == 0) return;
    beside([jobs = encodes_](cuda::Stream side) { return cuda::encode_together(std::span(jobs.of).first(jobs.n), side); });
    encodes_ = {};
}

void* Queue::codes_ready() {
    if (!batch_) return nullptr;
    give_encodes();  // if that was not done meanwhile (catch_up)
    launch([done = side_done_](const Lanes& lanes) { return cuda::record(done, lanes.side); });
    return side_done_;
}

void Queue::settle() {
    give_encodes();
    join();
}

void Queue::join() {
    if (batch_ || !deferring_) give_encodes();  // the next launches that wait have data of their own, these have not
    batch_.reset();
    moving_ = false;
    if (!std::exchange(side_busy_, false)) return;
    if (encodes_.n == 0) side_slots_.clear();
    launch([done = side_done_](const Lanes& lanes) {
        const cuda::Status s = cuda::record(done, lanes.side);
        return s.ok() ? cuda::wait_for(lanes.main, done) : s;
    });
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

const float* Queue::turns_of_positions(const RopeTable& rope, int head_dim, std::span<const std::int32_t> positions) {
    const float* digits = tables_->turns(rope.frequencies);
    const cuda::RopeLayout layout = rope_layout(rope);
    const int n = static_cast<int>(positions.size()), n_freq = rope.n_freq;
    const Copy& copy = uploaded(Use::positions, {reinterpret_cast<const std::uint8_t*>(positions.data()), positions.size_bytes()});
    const TurnsKey key{digits, head_dim, layout.n_dims, layout.n_offset, n, layout.adjacent, &copy, copy.number};
    float* to = memory<float>(Use::turns, static_cast<std::size_t>(n) * 2 * head_dim);
    if (key == turns_) return to;
    settle();
    launch([=, at = copy.array.as<std::int32_t>()](const Lanes& lanes) {
        return cuda::spread_turns(digits, n_freq, layout, head_dim, at, n, to, lanes.main);
    });
    turns_ = key;
    return to;
}

Queue::PlannedAttention& Queue::plan(const cuda::AttentionShape& s, bool rehearsal) {
    std::vector<int> key{s.head_dim,      s.n_head, s.n_head_kv, s.n_tokens, s.n_kv[0], static_cast<int>(s.n_kv.size()),
                         s.exact_windows, s.term,   rehearsal};
    for (const CodecId codec : s.formats) key.push_back(static_cast<int>(codec));
    const auto found = std::ranges::find(plans_, key, &PlannedAttention::key);
    PlannedAttention& p = found == plans_.end() ? new_plan(s, key) : *found;
    p.used = ++clock_, p.graph = graph_;
    return p;
}

/// Batches of a prompt have other numbers of cells each: their plan takes the memory of the one before, whose launches are before its own.
Queue::PlannedAttention& Queue::new_plan(const cuda::AttentionShape& s, const std::vector<int>& key) {
    constexpr std::size_t kCells = 4;  // where a key has them
    const auto follows = [&](const PlannedAttention& p) {
        if (p.graph == graph_ || p.key.size() != key.size()) return false;
        std::vector<int> other = p.key;
        other[kCells] = key[kCells];
        return other == key;
    };
    cuda::AttentionPlan plan;
    must(cuda::plan_attention(tables_->device(), s, plan));
    auto at = plan.prefill.n_splits > 0 ? std::ranges::find_if(plans_, follows) : plans_.end();
    if (at == plans_.end()) {
        if (plans_.size() == kPlans) {
            catch_up();
            must(cuda::synchronize(stream_));
            plans_.erase(std::ranges::min_element(plans_, {}, &PlannedAttention::used));
        }
        plans_.emplace_back();
        at = std::prev(plans_.end());
    }
    at->key.clear();  // what fails below leaves no plan
    reserve(at->workspace, plan.workspace_bytes);
    must(cuda::prepare_workspace(plan, at->workspace.as<void>(), stream_));
    at->plan = std::move(plan), at->key = key, at->number = ++clock_;
    return *at;
}

std::span<const std::uint64_t> Queue::see_cells(cuda::SeeCells args) {
    const std::size_t n = (static_cast<std::size_t>(args.n_kv) + kTileKeys - 1) / kTileKeys;
    if (n > seen_words_) {
        constexpr std::size_t kLeast = 4096;  // 262,144 cells: other memory is waited for
        const std::size_t words = std::bit_ceil(std::max(n, kLeast));
        void* memory = nullptr;
        must(cuda::allocate_shared(words * sizeof(std::uint64_t), memory));
        cuda::release_shared(std::exchange(seen_, static_cast<std::uint64_t*>(memory)));
        seen_words_ = words;
    }
    args.seen = seen_;
    must(cuda::see_cells(args, look_));
    must(cuda::synchronize(look_));
    return {seen_, n};
}

bool Queue::take_not_finite() {
    std::atomic_ref<std::uint32_t> found(*not_finite_);
    return found.load(std::memory_order_relaxed) && found.exchange(0) != 0;
}

}  // namespace turboquant
