// What the verbs of stores on a GPU need one after the other: a stream, memory that is used again by the next verb, and what of a step is
// the same for all layers (StoreContext::device).
//
// A verb decides on the host what is to be done, puts data where the device finds it (upload, refresh), and gives launches. Launches are
// done at once, or wait in a list until their graph is put together (defer). Data is not part of the list, so it lies in memory of its own
// for all of a graph: the same verbs on another step are the same list.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <list>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "turboquant/cache/cuda/device_tables.h"
#include "turboquant/cache/cuda/launches.h"
#include "turboquant/cache/tile_store.h"
#include "turboquant/cuda/encode.h"
#include "turboquant/cuda/masks.h"
#include "turboquant/cuda/pieces.h"
#include "turboquant/cuda/step.h"

namespace turboquant {

/// Up to so many query tokens a step decodes: exact rows are one more part of its calls, and steps come again with the same cells.
inline constexpr int kDecodeTokens = 8;
/// Drafts to be verified: they come again with the same cells, too.
inline constexpr int kDraftTokens = 32;

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
    /// As long as this is held nobody waits for streams of queues by synchronize_all(), which would end a capture that they are in.
    static std::unique_lock<std::mutex> capturing();
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
    Lanes lanes() const { return {stream_, side_}; }
    /// A launch's rehearsal: the same kernel on like data, whose results nobody reads, so that code and data are near when it is done. May be
    /// done at any time between the launch before on the main stream and this one, or not at all; only where launches wait.
    template <class F>
    void rehearse(const F& f) {
        if (deferring_) rehearsals_.add(f);
    }
    const Launches& rehearsals() const { return rehearsals_; }
    /// Work that wants queries, not what the step keeps: done before the next launch, or as soon as the
    /// queries are there, beside what else is done until then. f(stream).
    template <class F>
    void early(const F& f) {
        const auto on_main = [f](const Lanes& lanes) { return f(lanes.main); };
        deferring_ ? early_.add(on_main) : must(on_main(lanes()));
    }
    const Launches& earlies() const { return early_; }
    DeviceTables& tables() const { return *tables_; }

    /// Launches wait from now on, until take(). `catch_up` is called where that cannot be: it takes and does them, and launches are done at
    /// once from then on.
    void defer(std::function<void()> catch_up);
    bool deferring() const { return deferring_; }
    const Launches& waiting() const { return waiting_; }
    /// Ends that; those that wait are the caller's.
    Launches& take();  ///< and those of rehearsals() and earlies()
    /// For all who need what was launched to be under way, or its memory to be free: the host looks at results, memory is replaced.
    void catch_up() {
        give_encodes();
        if (deferring_) catch_up_();
    }
    /// Where data lies that was uploaded for the graph before is free for the next. Until end_graph() what is not wanted within the graph
    /// waits (after_graph).
    void begin_graph();
    void end_graph(bool given = true);
    /// f is done when all of the graph is given, its launches one by one, or not at all if it was not; at once if there is no graph.
    void after_graph(std::function<void()> f) { in_graph_ ? after_.push_back(std::move(f)) : f(); }
    std::uint64_t graph() const { return graph_; }  ///< changes with begin_graph()

    /// f(lanes): Launches::add.
    template <class F>
    void launch(const F& f) {
        keeping_ = only_kept_ = false;
        deferring_ ? waiting_.add(f) : must(f(lanes()));
    }
    /// Keeps rows: in one launch with those before, or beside them, if nothing else was given to the main stream since; and whether nothing was
    /// (AttentionArgs::beside_keeping).
    /// `slots`: the host's copy of the rows'.
    void keep(cuda::KeepRows rows, std::span<const std::int32_t> slots);
    bool keeping() const { return keeping_; }
    std::span<const std::int32_t> kept_slots() const { return kept_slots_; }
    /// Rows of keys and values that were kept, in these slots, since others gave work: the rows are still where the model made them. Or null.
    const cuda::KeepRows* kept_pair(std::span<const std::int32_t> slots) const {
        return n_kept_ == 2 && std::ranges::equal(slots, kept_slots_) ? kept_ : nullptr;
    }
    /// Takes away the launch that keeps them, if that waits and is the last: another does it.
    bool drop_keeping() {
        if (!(keeping_ && joined_ && deferring_)) return false;
        waiting_.drop_last();
        keeping_ = joined_ = false;
        return true;
    }
    /// Whether nothing but such launches was given since others gave work: what early() is given need wait for nothing of ours then.
    bool only_kept() const { return only_kept_; }
    /// The rows that were kept, whatever their slots; something was written where they lie.
    std::span<const cuda::KeepRows> kept() const { return {kept_, static_cast<std::size_t>(n_kept_)}; }
    void forget_kept() { n_kept_ = 0; }
    /// Others give work to their stream that ours waits for.
    void other_work() { keeping_ = false, n_kept_ = 0, only_kept_ = true; }
    /// At least so many bytes; contents are lost. With room for more: what grows with the cells would be new memory for each batch of a
    /// prompt, which the GPU is waited for and which is another list of launches.
    void reserve(cuda::DeviceArray& a, std::size_t bytes) {
        constexpr std::size_t kLarge = std::size_t{1} << 24;
        if (bytes <= a.bytes()) return;
        catch_up();
        settle();
        must(a.reserve(bytes < kLarge ? std::bit_ceil(bytes) : bytes + bytes / 8, stream_));
    }

    /// Memory of a purpose, until it is asked for again.
    enum class Use {
        rows,
        places,
        slots,
        rounded,
        aside,
        ids,
        positions,
        turns,
        shifts,
        form,
        form_values,
        queries,
        terms,
        offsets,
        from,
        to,
        term_ids,
        rehearsed,
        count
    };
    template <class T>
    T* memory(Use use, std::size_t n) {
        // Not by a little at a time: other memory is another list of launches.
        constexpr std::size_t kLeast = std::size_t{1} << 18;
        cuda::DeviceArray& a = arrays_[static_cast<std::size_t>(use)];
        if (n * sizeof(T) > a.bytes()) reserve(a, std::bit_ceil(std::max(n * sizeof(T), kLeast)));
        return a.as<T>();
    }

    /// Data on the device and what the host knows of it.
    struct Copy {
        cuda::DeviceArray array{};
        std::vector<std::uint8_t> bytes{};
        std::uint64_t number = 0;  ///< changes with the data
    };
    void reserve(Copy& copy, std::size_t bytes) {
        if (bytes > copy.array.bytes()) reserve(copy.array, bytes), copy.bytes.clear();
    }
    /// Makes the copy one of `data`; only what changed is sent.
    template <class T>
    T* refresh(Copy& copy, const T* data, std::size_t n) {
        refresh_bytes(copy, reinterpret_cast<const std::uint8_t*>(data), n * sizeof(T));
        return copy.array.as<T>();
    }
    /// Data on the device for the verbs of a graph. What is there already is not copied again.
    template <class T>
    const T* upload(Use use, std::span<const T> data) {
        return uploaded(use, {reinterpret_cast<const std::uint8_t*>(data.data()), data.size_bytes()}).array.template as<T>();
    }
    /// f(stream) on another stream, for work that nothing waits for before the graph's end: it begins after all that is given to the main one
    /// until now.
    template <class F>
    void beside(const F& f) {
        fork();
        launch([f](const Lanes& lanes) { return f(lanes.side); });
    }
    /// Encodes there, some time before settle() is through: several layers' rows in one launch.
    void encode_later(const cuda::EncodePlan& plan, const cuda::EncodeArgs& args);
    /// Encodes a batch's keys or values there, both in one launch, beside what attention does before it reads codes: until codes_ready() or
    /// settle(). What was given before must have been waited for (settle), but for the batch's other side.
    void encode_batch(const cuda::EncodePlan& plan, const cuda::EncodeArgs& args) {
        encode_later(plan, args);
        batch_ = plan.side;
    }
    /// Whether what waits for its launch is the batch's other side and nothing else.
    bool other_side_waits(Side side) const { return batch_ && *batch_ != side && encodes_.n == 1 && !side_busy_ && !moving_; }
    /// For attention: the event after which a batch's codes are there, AttentionArgs::codes_ready; null: there are none that it must wait for.
    void* codes_ready();
    /// What waits for that event was given.
    void codes_awaited() {
        if (batch_) batch_.reset(), side_busy_ = false;
    }
    /// Others' work comes next, which may write where the batch's rows are.
    void settle_batch() {
        if (batch_) settle();
    }
    /// A good place to begin that: no launch follows that may begin early (keeping()).
    void end_layer();
    /// Exact rows move there: attention over them must not begin before. Until settle().
    void moving() { moving_ = true; }
    bool rows_move() const { return moving_; }
    /// The main stream goes on after the others. Called by all that touches what they may be working on.
    void settle();
    /// The same, but few rows that encode_later() has wait on, for those of more layers.
    void join();

    /// Cosines and sines at these positions.
    const float* turns_of_positions(const RopeTable& rope, int head_dim, std::span<const std::int32_t> positions);

    struct PlannedAttention {
        cuda::AttentionPlan plan;
        cuda::DeviceArray workspace;
        std::vector<int> key{};
        std::uint64_t used = 0, number = 0;  ///< no two plans have one number
        std::uint64_t graph = 0;             ///< the last that used it
    };
    /// `rehearsal`: with a workspace of its own.
    PlannedAttention& plan(const cuda::AttentionShape& shape, bool rehearsal = false);

    /// What comes with the masks of a call, on the device; of several sequences one after the other, strides apart.
    struct Step {
        std::vector<std::uint64_t> numbers{};
        const std::uint16_t* mask = nullptr;  ///< as the call's, or with exact cells hidden
        std::size_t mask_stride = 0, mask_seq_stride = 0;
        const std::uint8_t *mask_tiles = nullptr, *exact_mask_tiles = nullptr;  ///< or null
        bool has_own_mask = false;
        int n_slots = 0;  ///< of exact rows, at most
        /// Of rows that the step makes; old_mask is exact_mask without them, new_mask theirs, [seq][token][row].
        std::vector<std::int32_t> new_slots{};
        std::size_t exact_stride = 0, cell_seq_stride = 0;
        int max_position = 0;
        std::vector<std::uint64_t> cells{};  ///< TileStore::StreamCall::cells of what cell_pos and cell_term hold; empty: not known
        cuda::DeviceArray own_mask, exact_mask, old_mask, new_mask, tile_pos, of_mask, of_exact_mask;
        Copy exact_cells, exact_positions, exact_n, slots_of_new, cell_pos, cell_term;
    };
    /// That of numbers (TileStore::attend), of one or of all sequences, filled in by `make` if they are others than were there, or 0.
    template <class F>
    Step& step(std::span<const std::uint64_t> numbers, F&& make) {
        const std::size_t at = numbers[0] & 0xffff;
        while (steps_.size() <= at) steps_.emplace_back();
        Step& s = steps_[at];
        if (numbers[0] == 0 || !std::ranges::equal(s.numbers, numbers)) make(s), s.numbers.assign(numbers.begin(), numbers.end());
        return s;
    }

    /// SeeCells::seen of a mask that was there before the graph. Waits for nothing else: where batches are under way (on this GPU, or on
    /// others that this one's batch is for), the host goes on ahead of them.
    std::span<const std::uint64_t> see_cells(cuda::SeeCells args);

    /// Slots of the rows that the second stream encodes, of a batch's keys or its values; false if those of the other side differ.
    bool same_slots(std::span<const std::int32_t> slots);

    std::uint32_t* not_finite() const { return not_finite_; }
    /// Whether a vector that was written by work done since the last call was not finite. Nothing is waited for.
    bool take_not_finite();

  private:
    void fork();
    void give_encodes();
    PlannedAttention& new_plan(const cuda::AttentionShape& shape, const std::vector<int>& key);
    static std::mutex& shared_mutex();
    static Queue& shared(int device);
    void refresh_bytes(Copy& copy, const std::uint8_t* data, std::size_t bytes);
    void to_device(std::uint8_t* device, const std::uint8_t* host, std::size_t bytes);
    void send_pieces();
    Copy& uploaded(Use use, std::span<const std::uint8_t> data);
    /// Copies of a graph's data, those of a purpose in the order in which they came up.
    struct Uploads {
        std::deque<Copy> copies;
        std::size_t n_used = 0;
    };
    static constexpr std::size_t kUses = static_cast<std::size_t>(Use::count);
    static constexpr std::size_t kPlans = 24;  // calls of up to 8 tokens or sequences, and their rehearsals

    int device_;
    DeviceTables* tables_;
    cuda::Stream stream_ = nullptr;
    cuda::Stream side_ = nullptr;
    cuda::Stream look_ = nullptr;  ///< the host waits for it, so nothing lasting is given to it
    bool side_busy_ = false;
    void *forked_ = nullptr, *side_done_ = nullptr;
    std::array<cuda::DeviceArray, kUses> arrays_;
    std::array<Uploads, kUses> uploads_;
    std::uint32_t* not_finite_ = nullptr;  ///< memory of the host
    std::uint64_t* seen_ = nullptr;        ///< of the host, too
    std::size_t seen_words_ = 0;
    bool deferring_ = false, keeping_ = false, moving_ = false, in_graph_ = false, only_kept_ = false;
    cuda::Pieces pieces_;  ///< on their way, before the launches that wait
    std::vector<std::function<void()>> after_;
    std::function<void()> catch_up_;
    Launches waiting_, rehearsals_, early_;
    struct EncodeJobs {
        std::array<cuda::EncodeJob, cuda::kMostEncodeJobs> of;
        std::size_t n = 0;
    } encodes_;
    std::optional<Side> batch_;  ///< of encode_batch(), for which the main stream does not wait yet
    cuda::KeepRows kept_[2];     ///< since others gave work
    int n_kept_ = 0;             ///< of them; 2: in the same slots
    std::vector<std::int32_t> kept_slots_;
    bool may_join_ = false, joined_ = false;  ///< the last launch keeps the first of them; both
    std::list<PlannedAttention> plans_;       ///< launches that wait, and graphs, have their addresses
    std::uint64_t clock_ = 0, graph_ = 0;
    std::size_t layers_ = 0;  ///< of the graph, attended to
    std::deque<Step> steps_;
    std::vector<std::int32_t> side_slots_;
    struct TurnsKey {
        const float* digits = nullptr;
        int head_dim = 0, n_dims = 0, n_offset = 0, n = 0;
        bool adjacent = false;
        const Copy* positions = nullptr;
        std::uint64_t number = 0;
        friend bool operator==(const TurnsKey&, const TurnsKey&) = default;
    } turns_;
};

inline cuda::RopeLayout rope_layout(const RopeTable& rope) { return {rope.n_dims, rope.n_offset, rope.pairs == RopePairs::adjacent}; }

}  // namespace turboquant
